"""``omniq bench --suite``: every variant on every case of a suite, in one run."""

from __future__ import annotations

import gc
import importlib.metadata
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from omniq_compile.benchmark.gemm import (
    GemmRate,
    Peak,
    Shape,
    gemm_rate,
    linear_shapes,
    measure_peaks,
)
from omniq_compile.benchmark.machine import environment
from omniq_compile.benchmark.measure import run_bench
from omniq_compile.benchmark.result import BASELINE, BenchConfig, BenchResult
from omniq_compile.benchmark.suites import SUITES, Case, Suite
from omniq_compile.benchmark.variants import Variant, named, suite_variants
from omniq_compile.lowering.errors import OmniqError, OptionError, unknown
from omniq_compile.memory import release_unused
from omniq_compile.models.families import preset_config, transformer_class
from omniq_compile.models.random_models import make_inputs
from omniq_compile.output_file import write
from omniq_compile.planning.meta_run import to_meta
from omniq_compile.strict_json import to_json

PACKAGES = ("triton", "torchao", "diffusers")


@dataclass
class CaseResult:
    """One case: its times, errors and memory, and by variant how near its GEMMs are to the peak.

    ``error`` says why the case as a whole has no times, ``gemm_errors`` why a variant has no rate.
    """

    name: str
    bench: BenchResult | None = None
    gemms: dict[str, GemmRate] = field(default_factory=dict)
    gemm_errors: dict[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass
class SuiteResult:
    """A suite as it ran: with what, where, the measured peaks and each case."""

    suite: str
    about: str
    command: str
    environment: dict[str, Any]
    peaks: list[Peak]
    cases: list[CaseResult] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether anything has no figure."""
        return any(c.error or c.gemm_errors or (c.bench and c.bench.failed) for c in self.cases)

    def to_json(self) -> str:
        """Return everything as JSON."""
        data = asdict(self)
        for case, result in zip(data["cases"], self.cases, strict=True):
            case["bench"] = result.bench.as_dict() if result.bench else None
        return to_json(data, indent=2)


def run_suite(
    name: str,
    console: Console,
    variants: list[Variant] | None = None,
    compiler: str = "inductor",
    command: str = "",
    only: str | None = None,
    keep: Callable[[SuiteResult], None] = lambda result: None,
) -> SuiteResult:
    """Run a suite of `SUITES`. What one variant or case raises is recorded, and the others go on.

    Args:
        variants: by default those of `suite_variants`.
        compiler: of the GEMMs that are timed on their own.
        command: what was typed, for the record.
        only: the words in the names of the cases to run; all by default.
        keep: gets the result after each case, with what is known by then.

    Raises:
        OptionError: no such suite or case, or its device is not in this machine.
    """
    suite, cases = _chosen(name, only)
    variants = suite_variants() if variants is None else variants
    where = environment(config_of(suite, suite.cases[0])) | _versions()
    result = SuiteResult(name, suite.about, command, where, measure_peaks(suite))
    for case in cases:
        console.print(f"[bold]{case.name}[/bold]")
        result.cases.append(_run_case(suite, case, variants, result.peaks, console, compiler))
        keep(result)
        gc.collect()
        release_unused(torch.device(suite.device))
    return result


def _chosen(name: str, only: str | None) -> tuple[Suite, list[Case]]:
    if name not in SUITES:
        raise OptionError(unknown("suite", name, SUITES))
    suite = SUITES[name]
    cases = [case for case in suite.cases if only is None or only in case.name]
    if not cases:
        names = ", ".join(repr(case.name) for case in suite.cases)
        raise OptionError(f"--case {only!r} is in the name of no case of suite {name!r}: {names}.")
    return suite, cases


def _run_case(
    suite: Suite,
    case: Case,
    variants: list[Variant],
    peaks: list[Peak],
    console: Console,
    compiler: str,
) -> CaseResult:
    result = CaseResult(case.name)
    config = config_of(suite, case)
    try:
        shapes = shapes_of(config)
        result.bench = run_bench(config, console, variants)
    # Whatever a case raises, such as memory running out, is a result beside the others.
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    for variant in variants:
        if variant.options is None and variant.name != BASELINE:
            continue
        try:
            with torch.no_grad():
                rate = gemm_rate(shapes, variant.options, suite, peaks, compiler)
        except Exception as error:
            result.gemm_errors[variant.name] = f"{type(error).__name__}: {error}"
        else:
            result.gemms[variant.name] = rate
    return result


def config_of(suite: Suite, case: Case) -> BenchConfig:
    """Return what `run_bench` takes for a case."""
    return BenchConfig(
        model=case.model, width=case.width, image_tokens=case.image_tokens,
        text_tokens=case.text_tokens, rounds=suite.rounds, warmup=suite.warmup,
        device=suite.device,
    )  # fmt: skip


def shapes_of(config: BenchConfig) -> Counter[Shape]:
    """Return `linear_shapes` of a config's model, of which nothing is computed."""
    arguments = preset_config(config.model, "block", config.width, config.blocks)
    with torch.device("meta"):
        model = transformer_class(config.model)(**arguments).eval()
    sizes = {"image_tokens": config.image_tokens, "text_tokens": config.text_tokens}
    inputs = to_meta(make_inputs(model, **sizes, dtype=torch.float32))
    with torch.no_grad():
        return linear_shapes(model, lambda: model(**inputs))


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def run_command(
    name: str,
    report: Path | None,
    console: Console,
    only: str | None = None,
    variants: list[str] | None = None,
    jobs: int | None = None,
) -> int:
    """Run a suite for the command line; returns 1 where anything failed, else 0.

    Args:
        report: a folder, made where there is none, for ``<date>-<device>.md`` and ``.json``. Both
            are written anew after each case, so that a run that is stopped keeps what it has; None
            prints the tables only.
        only: the words in the names of the cases to run, which are added to the files' names.
        variants: the names of those to measure; all by default.
        jobs: in how many processes everything is compiled first; by default it is not.

    Raises:
        OmniqError: no such suite, case, variant or device, or no folder can be made.
    """
    from omniq_compile.benchmark.ahead import compile_ahead
    from omniq_compile.benchmark.markdown import markdown

    if report is not None:
        try:
            report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OmniqError(
                f"--report {report} cannot be made a folder ({error.strerror}). Name another one."
            ) from error
    written: list[Path] = []

    def keep(result: SuiteResult) -> None:
        if report is not None:
            words = [result.environment["device"], *([only] if only else [])]
            stem = "-".join([result.environment["date"][:10], *map(_slug, words)])
            written[:] = [report / f"{stem}.md", report / f"{stem}.json"]
            for path, text in zip(
                written, (markdown(result), result.to_json() + "\n"), strict=True
            ):
                write("--report", path, text)

    command = shlex.join(["omniq", *sys.argv[1:]])
    chosen = suite_variants() if variants is None else named(suite_variants(), variants)
    if jobs is not None:
        suite, cases = _chosen(name, only)
        config_of(suite, cases[0])  # before many processes find that the device is not here
        console.print(f"compiling in {jobs} process(es)")
        for failure in compile_ahead(suite, cases, chosen, jobs):
            console.print(f"not compiled ahead: {failure}", markup=False, soft_wrap=True)
    result = run_suite(name, console, chosen, command=command, only=only, keep=keep)
    console.print(markdown(result), markup=False, highlight=False, soft_wrap=True)
    if written:
        console.print(f"written to {written[0]} and .json", markup=False)
    return 1 if result.failed else 0


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
