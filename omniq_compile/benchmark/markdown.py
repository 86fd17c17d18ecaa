"""A suite's result as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable

from omniq_compile.benchmark.result import BASELINE, Measurement
from omniq_compile.benchmark.suite_runner import CaseResult, SuiteResult

PACKAGES = ("torch", "cuda", "hip", "triton", "torchao", "diffusers")
COLUMNS = (
    "variant", "median, ms", "fastest, ms", "host, ms", "speed-up", "of medians",
    "as a graph, ms", "speed-up as a graph",
    "error to float32", "error to BF16", "weights, MB", "peak of a call, MB", "GEMMs, TOPS",
    "of the peak", "kernels",
)  # fmt: skip


def markdown(result: SuiteResult) -> str:
    """Return the page: what was run where, the measured peaks, and a table a case."""
    where = result.environment
    versions = ", ".join(f"{name} {where[name]}" for name in PACKAGES if where.get(name))
    lines = [
        f"# {where['device']}, {where['date'][:10]}",
        "",
        f"Suite `{result.suite}`: {result.about}. omniq {where['omniq']}, {versions}, Python "
        f"{where['python']}. Run with `{result.command}`.",
        "",
        f"Speed-up is {BASELINE} BF16's time by the variant's: the median of the rounds' ratios, "
        "and the ratio of the medians. Variants take turns; each time is the mean of "
        f"{where['calls_per_timing']} call(s) in a row after {where['calls_before_timing']}, on a "
        "GPU by its own clock. Host is what "
        "the host takes to ask a GPU for a call: where that is as long, it sets the pace. As a "
        "graph: the same call replayed as a CUDA graph, where the host sets no pace. Errors "
        "are ||y - reference|| / ||reference|| of the output. GEMMs are timed on their own, on a "
        "GPU in a CUDA graph, and compared with a large square GEMM: native kernels with that of "
        "their precision, emulated ones with BF16's.",
        "",
        *_table(
            ("peak", "TOPS"),
            [(p.dtype, _number(p.rate, 1e-12, 1) if p.rate else p.error or "-")
             for p in result.peaks],
        ),
    ]  # fmt: skip
    for case in result.cases:
        lines += ["", f"## {case.name}", ""]
        lines += _case(case)
    return "\n".join(lines) + "\n"


def _case(case: CaseResult) -> list[str]:
    if case.bench is None:
        return [f"Failed: {one_line(case.error or '')}"]
    lines = _table(COLUMNS, [_row(case, m) for m in case.bench.measurements])
    failures = {m.name: m.error for m in case.bench.measurements if m.error}
    failures |= {
        f"CUDA graph of {m.name}": m.graph_error for m in case.bench.measurements if m.graph_error
    }
    failures |= {f"GEMMs of {name}": error for name, error in case.gemm_errors.items()}
    for note in case.bench.notes:
        lines += ["", f"Note: {note}."]
    for name, error in failures.items():
        lines += ["", f"{name} failed: {one_line(error)}"]
    return lines


def _row(case: CaseResult, m: Measurement) -> tuple[str, ...]:
    assert case.bench is not None
    by_round, of_medians = case.bench.speedups(m.name) or (None, None)
    gemm = case.gemms.get(m.name)
    return (
        m.name,
        "failed" if m.error else _number(m.median_seconds, 1e3, 3),
        _number(m.min_seconds, 1e3, 3),
        _number(m.median_host_seconds, 1e3, 3),
        _number(by_round, 1, 2),
        _number(of_medians, 1, 2),
        _number(m.median_graph_seconds, 1e3, 3),
        _number(case.bench.graph_speedup(m.name), 1, 2),
        _number(m.error_to_float32, 1, 4),
        _number(m.error_to_eager, 1, 4),
        _number(m.weight_bytes, 1e-6, 1),
        _number(m.peak_call_bytes, 1e-6, 1),
        _number(gemm.rate if gemm else None, 1e-12, 1),
        f"{100 * gemm.share:.0f}% ({gemm.peak})" if gemm and gemm.share else "-",
        ", ".join(gemm.kernels) if gemm else "-",
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = tuple(head)
    return [
        f"| {' | '.join(head)} |",
        f"| {' | '.join('---' for _ in head)} |",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def one_line(error: str) -> str:
    """Return the first paragraph of an error, and no more than a few lines of it."""
    # Dynamo and CUDA add paragraphs of advice; the JSON has all of it.
    return " ".join(error.split("\n\n")[0].split())[:400]
