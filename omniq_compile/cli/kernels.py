"""``omniq kernels``: the kernels of every target, and what this machine has."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from omniq_compile.kernel_table import kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes none."""


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    table = Table(title="Kernels, the preferred first; * is this machine")
    for heading in ("method", "target", "kernel", "kind", "about"):
        table.add_column(heading)
    for row in kernels():
        table.add_row(
            row.method,
            f"{row.target}{' *' if row.here else ''}",
            row.kernel,
            "native" if row.native else "emulated",
            row.about,
        )
    Console().print(table)
    return 0
