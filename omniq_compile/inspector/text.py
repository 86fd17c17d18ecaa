"""An inspection as text: a summary, a table of the products, and programs or differences."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence

from omniq_compile.inspector.inspection import Inspection, Part
from omniq_compile.reports.display import untraced_line
from omniq_compile.reports.report import Report

KERNELS = "kernels"


def render(inspection: Inspection, stages: Sequence[str]) -> str:
    """Return the whole dump; without the stage of kernels it is a Python file."""
    lines = list(_head(inspection))
    graphs = sorted({part.graph for part in inspection.parts})
    for graph in graphs:
        for stage in stages:
            if stage == KERNELS:
                lines += ["", *_kernels(inspection, graph)]
            else:
                lines += ["", inspection.program(stage, graph).rstrip()]
    for piece in inspection.own_kernels if KERNELS in stages else ():
        lines += ["", f"# {piece.language}: {piece.name}, omniq's own", piece.source.rstrip()]
    return "\n".join(lines) + "\n"


def render_diff(inspection: Inspection, before: str, after: str) -> str:
    """Return the unified difference of every distinct part between two stages."""
    lines = list(_head(inspection))
    for part in inspection.parts:
        title = part_title(part)
        lines.append("")
        lines += difflib.unified_diff(
            part.functions[before].splitlines(),
            part.functions[after].splitlines(),
            f"{before}: {title}",
            f"{after}: {title}",
            lineterm="",
            n=2,
        )
    return "\n".join(lines) + "\n"


def part_title(part: Part) -> str:
    """Name a part in one line."""
    if not part.label:
        return f"graph {part.graph}, outside the blocks"
    return f"{part.label} ({part.kind}), x {part.count}"


def _head(inspection: Inspection) -> Iterator[str]:
    report = inspection.report
    yield f"# {inspection.model}: {report.options['method']} on {report.target}"
    yield from _summary(report)
    if inspection.layer is not None:
        yield f"# shown: the layers that {inspection.layer!r} names, and what feeds them"
    yield ""
    yield from _table(inspection)


def _summary(report: Report) -> Iterator[str]:
    before, after = report.weight_bytes_before, report.weight_bytes_after
    yield (
        f"# {len(report.sites)} sites: {len(report.rewritten)} rewritten, {len(report.kept)} kept; "
        f"their weights {before:,} -> {after:,} bytes"
    )
    for reason, count in Counter(s.decision.reason for s in report.kept).most_common():
        yield f"# kept {count}: {reason}"
    for pattern, near in report.unmatched.items():
        yield f"# pattern {pattern!r} matches nothing; nearest: {', '.join(near) or '-'}"
    if report.untraced:
        yield f"# {untraced_line(report.untraced)}"


def _table(inspection: Inspection) -> Iterator[str]:
    header: tuple[str, ...] = ("layer", "spelling", "M x K x N", "decision", "kernel or reason")
    rows: list[tuple[Part, tuple[str, ...]]] = []
    for part in inspection.parts:
        for view in part.sites:
            site, decision = view.site, view.site.decision
            indent = "  " if part.label else ""
            row: tuple[str, ...] = (
                indent + (view.layer or "(root)"),
                site.spelling,
                f"{site.M} x {site.K} x {site.N}",
                decision.method or "kept",
                decision.kernel or decision.reason,
            )
            rows.append((part, row))
    cells: list[tuple[str, ...]] = [header, *(row for _, row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        text = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        return f"# {' '.join(text.rstrip().splitlines())}"

    yield line(header)
    shown: Part | None = None
    for part, row in rows:
        if part is not shown and part.label:
            yield f"# {part.label} ({part.kind}), x {part.count}"
        shown = part
        yield line(row)


def _kernels(inspection: Inspection, graph: int) -> Iterator[str]:
    target = inspection.report.target
    if inspection.no_kernels is not None:
        yield f"# no code is generated: {inspection.no_kernels}"
        yield ""
        yield inspection.program("lowered", graph).rstrip()
        return
    for part in inspection.parts:
        if part.graph != graph:
            continue
        yield f"# {part_title(part)}: what Inductor generates for {target}, each part on its own"
        for piece in part.kernels or []:
            yield f"\n# {piece.language}: {piece.name}"
            yield piece.source
        if part.no_kernels is not None:
            yield from (f"# {line}".rstrip() for line in part.no_kernels.splitlines())
            yield f"# The lowered program is what Inductor would compile for {target}."
            yield ""
            yield part.functions["lowered"]
