"""What was rewritten, into what, and why not: `explain` and the Report it returns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from omniq_compile.backend import run_passes
from omniq_compile.compiling.low_precision import SeenCasts
from omniq_compile.given_model import check_model
from omniq_compile.lowering.errors import OmniqError, OptionError, unknown
from omniq_compile.lowering.target import Target
from omniq_compile.passes import sites as passes_sites
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.context import Context
from omniq_compile.passes.legal import STAGES
from omniq_compile.passes.patterns import unmatched
from omniq_compile.passes.printing.program import program
from omniq_compile.reports import display
from omniq_compile.reports.summary import site_bytes, weight_bytes
from omniq_compile.reports.tracing import run_traced
from omniq_compile.reports.untraced import UntracedLinears


@dataclass(frozen=True)
class Decision:
    """A method, or None for kept as it was; why; and the kernel that a method runs on."""

    method: str | None
    reason: str
    kernel: str | None


@dataclass(frozen=True)
class Site:
    """One GEMM: ``[..., M, K]`` times ``[N, K]``; symbolic sizes are text, None is unknown.

    ``weight_bytes_before`` and ``weight_bytes_after`` are of its weight, and None where two
    activations meet.
    """

    graph: int
    layer: str
    spelling: str
    kind: str
    weight: str
    M: int | str | None
    K: int | str | None
    N: int | str | None
    dtype: str
    decision: Decision
    weight_bytes_before: int | None = None
    weight_bytes_after: int | None = None


@dataclass(frozen=True)
class GraphReport:
    """One traced graph: its programs by stage, and its passes as they ran."""

    programs: dict[str, str]
    passes: list[dict[str, Any]]


@dataclass(frozen=True, repr=False)
class Report:
    """Everything omniq does to a model: printed, a table of its products.

    Attributes:
        options: as checked, with the defaults; they can be given again.
        target: what was lowered for.
        sites: in the order of the model.
        graphs: more than one where Dynamo had to break the model.
        weight_bytes_before, weight_bytes_after: of the weights that are quantized.
        unmatched: layer patterns that match nothing, of any option, with the nearest layers.
        untraced: the model's linear layers whose weights no site multiplies by, kept ones included:
            they were not called in this call, or Python ran them outside the graphs.
    """

    options: dict[str, Any]
    target: str
    sites: list[Site] = field(default_factory=list)
    graphs: list[GraphReport] = field(default_factory=list)
    weight_bytes_before: int = 0
    weight_bytes_after: int = 0
    unmatched: dict[str, list[str]] = field(default_factory=dict)
    untraced: list[str] = field(default_factory=list)

    @property
    def rewritten(self) -> list[Site]:
        """The sites that have a method."""
        return [site for site in self.sites if site.decision.method]

    @property
    def kept(self) -> list[Site]:
        """The sites that keep their own precision."""
        return [site for site in self.sites if not site.decision.method]

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame`: one row a site, with the decision's fields as columns.

        Raises:
            OmniqError: pandas is not installed.
        """
        return display.to_pandas(self)

    def __repr__(self) -> str:
        """Say in one line what was done: all of it would be many pages."""
        return f"<Report: {display.first_line(self)}>"

    def __str__(self) -> str:
        """Return the table as text."""
        return display.to_text(display.to_rich(self))

    def __rich__(self) -> Any:
        """Print as a table with `rich.print`."""
        return display.to_rich(self)

    def _repr_html_(self) -> str:
        """Show as a table in a notebook."""
        return display.to_html(self)


@dataclass(frozen=True)
class Trace:
    """A model as it was traced: the configuration, what the passes made of each graph, and the
    linear layers that are in none.
    """

    config: QuantConfig
    contexts: list[Context]
    untraced: list[str]


def explain(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor,
    options: Mapping[str, Any] | QuantConfig,
    target: str | None = None,
    *,
    stages: Sequence[str] = STAGES,
) -> Report:
    """Trace a model and say what omniq does to it. The model runs once, unchanged.

    Args:
        model: any module; a compiled one is traced as it was before.
        inputs: keyword arguments as a dict, or positional ones as a sequence or one tensor.
        options: as given to ``torch.compile``.
        target: lower for this device instead of the model's own; it need not be present.
        stages: those whose programs the report holds, of traced, quantized and lowered; printing
            takes time, and ``()`` leaves all out.

    Raises:
        OptionError: no module, no arguments of a call, unknown options, target or stage.
        OmniqError: Dynamo traced no graph.
    """
    check_model(model, "explain")
    for stage in stages:
        if stage not in STAGES:
            raise OptionError(unknown("stage", stage, STAGES))
    return report_of(trace(model, inputs, options, target), stages)


def trace(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor,
    options: Mapping[str, Any] | QuantConfig,
    target: str | None = None,
) -> Trace:
    """Trace a model and run the passes on each graph; the arguments are those of `explain`."""
    config = QuantConfig.from_options(options)
    chosen = Target.parse(target) if target is not None else None
    contexts: list[Context] = []
    left = UntracedLinears(model)
    seen_casts = SeenCasts()  # of its own: a report changes no later compile

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        _, context = run_passes(gm, example_inputs, config, seen_casts, chosen, with_stages=True)
        contexts.append(context)
        return left.watched(gm, context)

    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (Mapping, Sequence)) or isinstance(inputs, str):
        raise OptionError(
            "inputs must be the model's arguments as a list or tuple, those by name as a dict, or "
            f"one tensor, not {inputs!r}."
        )
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    run_traced(model, args, kwargs, record)
    if not contexts:
        raise OmniqError(
            "Dynamo traced no graph from this model, so there is nothing to explain. "
            'TORCH_LOGS="dynamo" shows why.'
        )
    return Trace(config, contexts, left.names)


def report_of(trace: Trace, stages: Sequence[str] = STAGES) -> Report:
    """Word what the passes found, as plain data; of the programs those of some stages."""
    config, contexts = trace.config, trace.contexts
    bindings = {
        (b.expression.key, b.expression.leaves, b.format): b for c in contexts for b in c.bindings
    }
    sizes = [weight_bytes(binding) for binding in bindings.values()]
    layers = [site.layer for c in contexts for site in c.sites]
    patterns = [p for given in config.layer_patterns.values() for p in given]
    return Report(
        options=config.to_options(),
        target=str(contexts[0].target),
        sites=[_site(i, site) for i, c in enumerate(contexts) for site in c.sites],
        graphs=[_graph(i, c, stages) for i, c in enumerate(contexts)],
        weight_bytes_before=sum(before for before, _ in sizes),
        weight_bytes_after=sum(after for _, after in sizes),
        unmatched=unmatched(patterns, layers),
        untraced=trace.untraced,
    )


def _graph(index: int, context: Context, stages: Sequence[str]) -> GraphReport:
    assert context.stages is not None
    programs = {
        stage: program(gm, f"graph {index}, {stage}, {context.target}")
        for stage, gm in context.stages.items()
        if stage in stages
    }
    return GraphReport(programs, [dataclasses.asdict(r) for r in context.records])


def _site(graph: int, site: passes_sites.Site) -> Site:
    problem, decision = site.problem, site.decision
    sizes = (problem.M, problem.K, problem.N) if problem else (None, None, None)
    before, after = site_bytes(site) or (None, None)
    M, K, N = (size if size is None or isinstance(size, int) else str(size) for size in sizes)
    return Site(
        graph=graph,
        layer=site.layer,
        spelling=site.spelling,
        kind=site.kind.value,
        weight=site.weight_name,
        M=M,
        K=K,
        N=N,
        dtype=str(site.dtype).removeprefix("torch."),
        decision=Decision(
            decision.method, decision.reason, decision.kernel.name if decision.kernel else None
        ),
        weight_bytes_before=before,
        weight_bytes_after=after,
    )
