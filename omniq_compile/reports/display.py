"""A report as a table: as text, for pandas, a terminal and a notebook."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from omniq_compile.lowering.errors import OmniqError

if TYPE_CHECKING:
    from omniq_compile.reports.report import Report, Site

COLUMNS = ("layer", "spelling", "M x K x N", "decision", "kernel or reason")
# Of linear layers that no graph holds, this many are named.
MOST_NAMES = 5


def to_pandas(report: Report) -> Any:
    """Return a `pandas.DataFrame` of one row a site; see `Report.to_pandas`."""
    try:
        import pandas
    except ImportError as error:
        raise OmniqError("Report.to_pandas needs pandas: pip install pandas") from error
    rows = []
    for site in report.sites:
        row = dataclasses.asdict(site)
        rows.append(row | row.pop("decision"))
    return pandas.DataFrame(rows)


def to_rich(report: Report) -> Table:
    """Return the table that `rich` prints for a report."""
    title = escape_markup("\n".join(_summary(report)))
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for site in report.sites:
        style = "" if site.decision.method else "dim"
        table.add_row(*(escape_markup(cell) for cell in _cells(site)), style=style)
    return table


def to_text(*parts: Any) -> str:
    """Return what `rich` prints, as plain lines: wide enough for the longest, to be scrolled."""
    console = Console(file=io.StringIO(), width=sys.maxsize, highlight=False)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def to_html(report: Report) -> str:
    """Return what a notebook shows; every text of the model is escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(site))}</tr>"
        for site in report.sites
    )
    summary = "<br>".join(escape(line) for line in _summary(report))
    return (
        f"<p>{summary}</p><details open><summary>{len(report.sites)} products</summary>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></details>"
    )


def first_line(report: Report) -> str:
    """Return what was done, in few words."""
    before, after = report.weight_bytes_before, report.weight_bytes_after
    return (
        f"{report.options['method']} on {report.target}: {len(report.rewritten)} of "
        f"{len(report.sites)} products rewritten; their weights {before / 1e6:,.1f} -> "
        f"{after / 1e6:,.1f} MB"
    )


def _summary(report: Report) -> Iterator[str]:
    yield first_line(report)
    for reason, count in Counter(site.decision.reason for site in report.kept).most_common():
        yield f"kept {count}: {reason}"
    if report.untraced:
        yield untraced_line(report.untraced)


def untraced_line(names: Sequence[str]) -> str:
    """Word which linear layers no graph holds, the first of them by name."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (
        f"in no graph {len(names)}: {', '.join(names[:MOST_NAMES])}{more}: not called in this "
        "call, or run by Python outside the graphs"
    )


def _cells(site: Site) -> tuple[str, ...]:
    decision = site.decision
    return (
        site.layer or "(the model itself)",
        site.spelling,
        f"{site.M} x {site.K} x {site.N}",
        decision.method or "kept",
        decision.kernel or decision.reason,
    )
