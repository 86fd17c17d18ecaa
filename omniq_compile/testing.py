"""A pytest plugin: graphs as snapshots, so that a changed rewrite shows as a diff in review.

pytest loads this module in every project of an environment that has omniq, so it imports neither
torch nor syrupy before a test asks for the fixture.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

STAGES = ("traced", "quantized", "lowered")


class GraphSnapshot:
    """Compares what omniq makes of a model with the text that was stored for the test."""

    def __init__(self, assertion: Any) -> None:
        self._assertion = assertion
        self._names: set[str] = set()

    def __call__(
        self,
        model: Any,
        inputs: Mapping[str, Any] | Sequence[Any],
        *,
        options: Mapping[str, Any],
        target: str,
        stage: str = "quantized",
        name: str | None = None,
    ) -> None:
        """Trace a model, and compare a stage of its graphs with the stored text.

        ``pytest --snapshot-update`` stores it.

        Args:
            model: any module, in the state you compile it in.
            inputs: keyword arguments as a dict, or positional ones as a sequence.
            options: as given to ``torch.compile``.
            target: what to lower for, with its architecture, such as ``"cuda:sm_90"``: this
                machine's own would make the text differ between machines.
            stage: ``"traced"``, ``"quantized"`` or ``"lowered"``.
            name: of the snapshot, where a test has several; they are numbered otherwise.

        Raises:
            OptionError: an unknown option, stage, or a target without its architecture.
        """
        self.compare(graph_text(model, inputs, options, target, stage), name)

    def compare(self, text: str, name: str | None = None) -> None:
        """Compare any text with the stored one; fails with a diff, or where a name is taken."""
        if name in self._names:
            pytest.fail(f"two snapshots of one test are called {name!r}", pytrace=False)
        if name:
            self._names.add(name)
        assertion = self._assertion(name=name) if name else self._assertion
        if assertion == text:
            return
        result = assertion.executions[assertion.num_executions - 1]
        stored = str(result.recalled_data or "").splitlines()
        # syrupy's own diff marks letters by colour, which a log of CI does not show.
        lines = difflib.unified_diff(stored, text.splitlines(), "stored", "now", lineterm="", n=2)
        diff = "\n".join(lines)
        pytest.fail(
            f"the graph is not the stored one:\n{diff}\n"
            "If that is what you meant, run pytest --snapshot-update and commit the file.",
            pytrace=False,
        )


def graph_text(
    model: Any,
    inputs: Mapping[str, Any] | Sequence[Any],
    options: Mapping[str, Any],
    target: str,
    stage: str = "quantized",
) -> str:
    """Return the text that is compared: how many products of what decision, and the programs."""
    from omniq_compile.lowering.errors import OptionError, unknown
    from omniq_compile.lowering.target import ARCHITECTURES
    from omniq_compile.reports.report import explain

    if stage not in STAGES:
        raise OptionError(unknown("stage", stage, STAGES))
    architectures = ARCHITECTURES.get(target, ())
    if len(architectures) > 1:
        names = ", ".join(f"{target}:{arch}" for arch in architectures)
        raise OptionError(f"target {target!r} depends on the machine; name one of {names}")
    with _quiet():
        report = explain(model, inputs, options, target=target, stages=[stage])
    lines = [f"# {report.options['method']} on {report.target}: {len(report.sites)} products"]
    for site, count in Counter(_decision(site) for site in report.sites).items():
        lines.append(f"#   {count} x {site}")
    programs = [graph.programs[stage] for graph in report.graphs]
    return "\n".join([*lines, *programs])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch's trace of a compile, thousands of lines, out of the report of a failed test."""
    trace = logging.getLogger("torch.__trace")

    def drop(record: logging.LogRecord) -> bool:
        return False

    trace.addFilter(drop)
    try:
        yield
    finally:
        trace.removeFilter(drop)


def _decision(site: Any) -> str:
    decision = site.decision
    return (
        f"{decision.method}: {decision.kernel}" if decision.method else f"kept: {decision.reason}"
    )


@pytest.fixture
def graph_snapshot(request: pytest.FixtureRequest) -> GraphSnapshot:
    """Compare what omniq makes of a model with stored text; see `GraphSnapshot`."""
    try:
        from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode
    except ImportError:
        pytest.fail(
            "the fixture graph_snapshot needs syrupy: pip install 'omniq-compile[snapshots]'",
            pytrace=False,
        )

    class Text(SingleFileSnapshotExtension):  # type: ignore[misc]
        _write_mode = WriteMode.TEXT
        file_extension = "txt"

    snapshot = request.getfixturevalue("snapshot")
    return GraphSnapshot(snapshot.use_extension(Text))
