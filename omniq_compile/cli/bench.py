"""``omniq bench``: times omniq beside eager, Inductor and torchao on one transformer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from omniq_compile.benchmark.markdown import one_line
from omniq_compile.benchmark.measure import run_bench
from omniq_compile.benchmark.result import (
    BASELINE,
    DEVICES,
    DTYPES,
    BenchConfig,
    BenchResult,
    Measurement,
)
from omniq_compile.benchmark.suite_runner import run_command
from omniq_compile.benchmark.suites import SUITES
from omniq_compile.cli.whole_numbers import positive
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.models.families import FAMILIES
from omniq_compile.output_file import check_writable, write

# What `--quick` changes where the user asked for nothing else.
QUICK = {"width": 256, "image_tokens": 64, "text_tokens": 16, "rounds": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``omniq bench``."""
    # No option has a default here, so that one that is given shows: `BenchConfig` has them.
    default = BenchConfig()
    parser.add_argument(
        "--model", metavar="CLASS", help=f"one of {', '.join(FAMILIES)}; default: {default.model}"
    )
    parser.add_argument("--width", type=int, help="model width; default: as released")
    for name, what in (
        ("blocks", "number of blocks"),
        ("image_tokens", "tokens of the picture"),
        ("text_tokens", "tokens of the prompt"),
        ("rounds", "timed calls of each variant, in turn"),
        ("warmup", "untimed warm calls"),
        ("seed", "of weights and inputs"),
    ):
        flag, value = f"--{name.replace('_', '-')}", getattr(default, name)
        parser.add_argument(flag, type=int, help=f"{what}; default: {value}")
    parser.add_argument(
        "--settle",
        type=int,
        help="untimed calls before each timing, as a denoising loop calls block after block; "
        "default: 1, on a GPU or NPU 5",
    )
    parser.add_argument(
        "--calls",
        type=int,
        help="calls in a row that one timing is the mean of; default: 1, on a GPU 10, so that the "
        "device does not wait for the host",
    )
    parser.add_argument("--method", help=f"omniq's method; default: {default.method}")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; default: {default.dtype}")
    parser.add_argument("--device", help=f"{', '.join(DEVICES)}; default: {default.device}")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    for name, what in (("eager", "time eager too"), ("torchao", "time torchao's int8 too")):
        parser.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, help=f"{what}; default: yes"
        )
    parser.add_argument(
        "--quick", action="store_true", default=None, help="a small, short run, to try it out"
    )
    parser.add_argument(
        "--suite", metavar="NAME", help=f"every variant on fixed cases: {', '.join(SUITES)}"
    )
    parser.add_argument(
        "--case", metavar="WORDS", help="only a suite's cases with these words in their names"
    )
    parser.add_argument(
        "--variant",
        action="append",
        metavar="NAME",
        help="only this one of a suite's variants, and any other so named; Inductor is what they "
        "are compared with",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="where a suite's Markdown and JSON go"
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="compile a suite's programs in N processes before any is timed, which takes a machine "
        "with many cores a part of the time",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and write the JSON; return 1 when a variant failed, else 0.

    Raises:
        OmniqError: the options name no model that can be built, or do not go together; or FILE
            cannot be written.
    """
    if args.suite is not None:
        _refuse_options_of_one_model(args)
        return run_command(args.suite, args.report, Console(), args.case, args.variant, args.jobs)
    for option in ("case", "jobs", "report", "variant"):
        if getattr(args, option) is not None:
            raise OmniqError(f"--{option} is for a suite; name one: --suite {next(iter(SUITES))}")
    check_writable("--json", args.json)
    console = Console()
    result = run_bench(config_from(args), console)
    print_table(result, console)
    if args.json is not None:
        write("--json", args.json, result.to_json() + "\n")
        console.print(f"written to {escape(str(args.json))}")
    return 1 if result.failed else 0


def _refuse_options_of_one_model(args: argparse.Namespace) -> None:
    for name in (*BenchConfig.__dataclass_fields__, "quick", "json"):
        value = getattr(args, name, None)
        if value is not None:
            option = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            instead = "--report FOLDER writes its results" if name == "json" else "leave it out"
            raise OmniqError(
                f"{option} is for one model, and the cases of suite {args.suite!r} are fixed: "
                f"{instead}."
            )


def config_from(args: argparse.Namespace) -> BenchConfig:
    """Return the config that parsed arguments mean, with `QUICK` where ``--quick`` is given."""
    names = set(BenchConfig.__dataclass_fields__)
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    return BenchConfig(**{**(QUICK if args.quick else {}), **given})


def print_table(result: BenchResult, console: Console) -> None:
    """Print what was measured, where, and the times, errors and memory of each variant."""
    config, where = result.config, result.environment
    width = "released width" if config.width is None else f"width {config.width}"
    console.print(
        f"[bold]{config.model}[/bold], {width}, {config.blocks} block(s), "
        f"{config.image_tokens} image + {config.text_tokens} text tokens, {config.dtype}, "
        f"seed {config.seed}"
    )
    console.print(
        f"torch {where['torch']}, {escape(where['device'])}, {where['cpu_capability']}, "
        f"{where['threads']} thread(s), load {where['load_average']}, {where['date']}"
    )
    console.print(_speed_table(result))
    console.print(_quality_table(result))
    if result.lookups_per_call:
        console.print(
            f"omniq looks up {result.lookups_per_call:.0f} weights a call, in "
            f"{result.lookup_seconds_per_call * 1e6:.0f} us"
        )
    if result.peak_rss_bytes:
        console.print(f"peak resident memory of the process: {_megabytes(result.peak_rss_bytes)}")
    for note in result.notes:
        console.print(f"note: {escape(note)}")
    for m in result.measurements:
        if m.error:
            console.print(f"[red]{escape(m.name)} failed:[/red] {escape(one_line(m.error))}")
        if m.graph_error:
            text = one_line(m.graph_error)
            console.print(f"note: {escape(m.name)} is no CUDA graph: {escape(text)}")


def _speed_table(result: BenchResult) -> Table:
    ahead = any(m.median_host_seconds is not None for m in result.measurements)
    graphs = any(m.graph_seconds or m.graph_error for m in result.measurements)
    more = "; host: what the host takes to ask the device for a call" if ahead else ""
    more += "; as a graph: replayed as a CUDA graph, where the host sets no pace" if graphs else ""
    table = Table(
        title=f"One forward of the whole model, no_grad, {result.config.rounds} rounds in turn",
        caption=f"speed-up: {BASELINE}'s time by the variant's, as the median of the rounds' "
        f"ratios, and as the ratio of the medians; the first call compiles{more}",
    )
    table.add_column("variant")
    by_graph = ["as a graph", "speed-up as a graph"] if graphs else []
    titles = ("median", "min", *(["host"] if ahead else []), "speed-up", "of medians", *by_graph)
    for title in (*titles, "first call"):
        table.add_column(title, justify="right")
    for m in result.measurements:
        by_round, of_medians = result.speedups(m.name) or (None, None)
        cells = [
            _format(m.median_seconds, "{:.1f} ms", 1e3),
            _format(m.min_seconds, "{:.1f} ms", 1e3),
            *([_format(m.median_host_seconds, "{:.2f} ms", 1e3)] if ahead else []),
            _format(by_round, "{:.2f}x"),
            _format(of_medians, "{:.2f}x"),
            *([_format(m.median_graph_seconds, "{:.2f} ms", 1e3)] if graphs else []),
            *([_format(result.graph_speedup(m.name), "{:.2f}x")] if graphs else []),
            _format(m.first_call_seconds, "{:.1f} s"),
        ]
        table.add_row(*_row(m, cells))
    return table


def _quality_table(result: BenchResult) -> Table:
    table = Table(
        title="Error and memory",
        caption="error: ||y - reference|| / ||reference|| of the output; "
        "peak: what one call adds at most",
    )
    table.add_column("variant")
    for title in ("to float32", f"to eager {result.config.dtype}", "weights", "quantized", "peak"):
        table.add_column(title, justify="right")
    for m in result.measurements:
        cells = [
            _format(m.error_to_float32, "{:.4f}"),
            _format(m.error_to_eager, "{:.4f}"),
            _megabytes(m.weight_bytes),
            _megabytes(m.quantized_bytes),
            _megabytes(m.peak_call_bytes),
        ]
        table.add_row(*_row(m, cells))
    return table


def _row(m: Measurement, cells: list[str]) -> list[str]:
    return [m.name, *(["[red]failed[/red]", *cells[1:]] if m.error else cells)]


def _format(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else form.format(value * scale)


def _megabytes(value: Any) -> str:
    return _format(value, "{:,.1f} MB", 1e-6)
