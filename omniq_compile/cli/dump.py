"""``omniq dump MODEL --method int8``: what the backend does to a model, as text."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from omniq_compile.cli.models import resolve
from omniq_compile.cli.options import add_option_arguments, options_of
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.passes.legal import STAGES
from omniq_compile.report import Report, Site, explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a diffusers folder, a class with a size (QwenImageTransformer2DModel:tiny), or "
        "module:function that returns a model and its inputs",
    )
    add_option_arguments(parser)
    parser.add_argument("--target", help="lower for this target, present or not (cpu:avx512_vnni)")
    parser.add_argument(
        "--stage",
        nargs="+",
        choices=STAGES,
        default=["traced", "quantized"],
        help="which graphs to print (default: traced quantized)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there, not to the terminal")


def run(arguments: argparse.Namespace) -> int:
    """Trace the model, and print its sites and the graph at each stage."""
    loaded = resolve(arguments.model)
    report = explain(
        loaded.model, loaded.args or loaded.inputs, options_of(arguments), target=arguments.target
    )
    text = render(loaded.name, report, arguments.stage)
    if arguments.out is None:
        sys.stdout.write(text)
        return 0
    try:
        arguments.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OmniqError(f"cannot write {str(arguments.out)!r}: {error.strerror}.") from error
    return 0


def render(name: str, report: Report, stages: list[str]) -> str:
    """Return the whole dump: a summary, the sites, then the programs of each graph."""
    lines = [f"# {name}: {report.options['method']} on {report.target}", *_summary(report), ""]
    lines += list(_table(report.sites))
    for graph in report.graphs:
        for stage in stages:
            lines += ["", graph.programs[stage].rstrip()]
    return "\n".join(lines) + "\n"


def _summary(report: Report) -> Iterator[str]:
    before, after = report.weight_bytes_before, report.weight_bytes_after
    yield (
        f"# {len(report.sites)} sites: {len(report.rewritten)} rewritten, {len(report.kept)} kept; "
        f"their weights {before:,} -> {after:,} bytes"
    )
    for reason, count in Counter(s.decision.reason for s in report.kept).most_common():
        yield f"# kept {count}: {reason}"
    for pattern, near in report.unmatched.items():
        yield f"# ignored_layers {pattern!r} matches nothing; nearest: {', '.join(near) or '-'}"


def _table(sites: list[Site]) -> Iterator[str]:
    header = ("layer", "spelling", "M x K x N", "decision", "kernel or reason")
    rows = [
        (
            site.layer or "(root)",
            site.spelling,
            f"{site.M} x {site.K} x {site.N}",
            site.decision.method or "kept",
            site.decision.kernel or site.decision.reason,
        )
        for site in sites
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"# {line}".rstrip()
