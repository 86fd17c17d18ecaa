"""``omniq kernels``: what every (method, target) lowers to, and what this machine has."""

from __future__ import annotations

import argparse

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from omniq_compile.kernel_table import KernelRow, kernels
from omniq_compile.lowering.schemes import METHODS
from omniq_compile.lowering.target import Target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--target",
        help="the kernels of one target and why, such as cuda:sm_90; this machine's by default",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the first kernel's kind in every cell, then every kernel of one target.

    Raises:
        OptionError: there is no such target.
    """
    rows = kernels()
    console = Console()
    if arguments.target is None:
        console.print(_cells(rows))
    wanted = None if arguments.target is None else str(Target.parse(arguments.target))
    chosen = [row for row in rows if (row.target == wanted if wanted else row.here)]
    for target in dict.fromkeys(row.target for row in chosen):
        _print_target(target, [row for row in chosen if row.target == target], console)
    return 0


def _cells(rows: list[KernelRow]) -> Table:
    table = Table(
        title="What each cell runs on first; * is this machine",
        caption="native: the hardware multiplies in the method's precision; emulated: codes are "
        "decoded and multiplied in a wider one. `omniq kernels --target T` says why.",
        box=box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("target", no_wrap=True)
    for method in METHODS:
        table.add_column(method, min_width=len(method), overflow="fold")
    first = {(row.target, row.method): row for row in rows if row.preferred}
    for target in dict.fromkeys(row.target for row in rows):
        here = any(row.here for row in rows if row.target == target)
        cells = [_kind(first[target, method]) for method in METHODS]
        table.add_row(f"{target} *" if here else target, *cells)
    return table


def _kind(row: KernelRow) -> Text:
    return Text("native", "green") if row.native else Text("emulated", "yellow")


def _print_target(target: str, rows: list[KernelRow], console: Console) -> None:
    console.print(f"[bold]{target}[/bold], a kernel is tried when those before it refuse")
    for method in METHODS:
        console.print(f"  [bold]{method}[/bold]")
        for row in rows:
            if row.method == method:
                console.print(Padding(Text.assemble(_kind(row), f"  {row.kernel}"), (0, 4)))
                console.print(Padding(Text(row.about, "dim"), (0, 6)))
