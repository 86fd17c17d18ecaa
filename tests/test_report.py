"""What `explain` returns, as Python objects and tables; and the traces that compiles leave."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest
import torch
from rich.console import Console
from torch import nn

import omniq_compile as omniq

MODEL = """
import torch
from torch import nn

model = nn.Sequential(nn.Linear(48, 320), nn.GELU(), nn.Linear(320, 288)).requires_grad_(False)
options = {"method": "int8", "compiler": "eager"}
torch.compile(model, backend="omniq", options=options)(torch.randn(7, 48))
"""


class Evil(nn.Module):
    """A model with markup for names."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("<img src=x onerror=alert(1)>", nn.Linear(320, 288))
        self.add_module("last", nn.Linear(288, 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@pytest.fixture
def report() -> omniq.Report:
    return omniq.explain(Evil(), [torch.randn(7, 320)], {"method": "int8"}, target="cuda:sm_90")


def test_a_report_is_json_of_plain_values(report: omniq.Report) -> None:
    read = json.loads(report.to_json())
    assert read["target"] == "cuda:sm_90"
    assert [site["decision"]["method"] for site in read["sites"]] == ["int8", None]
    assert [site["N"] for site in read["sites"]] == [288, 40]


def test_a_report_is_a_data_frame(report: omniq.Report) -> None:
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["K"]) == [320, 288]
    assert list(frame["method"].isna()) == [False, True]
    assert frame["reason"][1] == "N = 40 is under min_features = 256"
    assert frame["kernel"][0] == report.sites[0].decision.kernel


def test_without_pandas_the_error_says_what_to_install(
    report: omniq.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(omniq.OmniqError, match="pip install pandas"):
        report.to_pandas()


def test_a_notebook_shows_a_table_in_which_everything_is_escaped(report: omniq.Report) -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.text = ""

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.tags.append(tag)

        def handle_data(self, data: str) -> None:
            self.text += f"{data}\n"

    page = Tags()
    page.feed(report._repr_html_())
    assert page.tags.count("tr") == 3
    assert "img" not in page.tags
    assert "<img src=x onerror=alert(1)>\n" in page.text
    assert "int8 on cuda:sm_90: 1 of 2 products rewritten" in page.text


def test_a_terminal_shows_a_table_in_which_markup_is_text(report: omniq.Report) -> None:
    console = Console(file=io.StringIO(), width=160)
    marked = dataclasses.replace(report.sites[0], layer="[red]bold[/red]")
    console.print(dataclasses.replace(report, sites=[marked, report.sites[1]]))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]bold[/red]" in out
    assert "kept 1: N = 40 is under min_features = 256" in out


def test_printed_it_is_a_table_and_shown_alone_a_line(report: omniq.Report) -> None:
    summary = "int8 on cuda:sm_90: 1 of 2 products rewritten; their weights 0.4 -> 0.1 MB"
    assert repr(report) == f"<Report: {summary}>"
    first, reason, columns, *rows = str(report).splitlines()
    assert (first, reason) == (summary, "kept 1: N = 40 is under min_features = 256")
    assert columns.split() == [
        "layer",
        "spelling",
        "M",
        "x",
        "K",
        "x",
        "N",
        "decision",
        "kernel",
        "or",
        "reason",
    ]
    assert [row.split()[-1] for row in rows] == [report.sites[0].decision.kernel, "256"]
    assert rows[0].startswith(report.sites[0].layer)


def test_its_options_can_be_given_again(report: omniq.Report) -> None:
    again = omniq.explain(Evil(), [torch.randn(7, 320)], report.options, target="cuda:sm_90")
    assert again.options == report.options


def run(tmp_path: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", MODEL], cwd=tmp_path, env=os.environ | environment,
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return done.stderr


# Earlier versions of PyTorch read the variable before omniq can make its name known.
LOG = "omniq" if torch.__version__ >= "2.13" else "omniq_compile"


def test_the_log_has_a_line_a_compile_and_tlparse_shows_every_stage(tmp_path: Path) -> None:
    """The trace is read by PyTorch's own tool."""
    run_with = {"TORCH_LOGS": LOG, "TORCH_TRACE": str(tmp_path / "trace")}
    lines = [line for line in run(tmp_path, **run_with).splitlines() if "sites:" in line]
    assert len(lines) == 1
    assert "2 sites: 1 int8, 1 kept (1 x K = 48 is under min_features = 256)" in lines[0]
    assert "weights 0.4 -> 0.1 MB; passes " in lines[0]
    [log] = (tmp_path / "trace").iterdir()
    tool = Path(sys.executable).with_name("tlparse")
    command = [str(tool), str(log), "-o", str(tmp_path / "out"), "--no-browser"]
    subprocess.run(command, check=True, capture_output=True)
    pages = {p.name.rsplit("_", 1)[0]: p for p in (tmp_path / "out").rglob("omniq_*")}
    assert set(pages) == {f"omniq_{n}" for n in ("summary", "traced", "quantized", "lowered")}
    assert "torch.ops.omniq.gemm" in pages["omniq_quantized"].read_text()
    assert "torch.ops.omniq.gemm" not in pages["omniq_lowered"].read_text()
    assert "2 sites: 1 int8, 1 kept" in pages["omniq_summary"].read_text()
    assert "omniq_quantized" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.skipif(torch.__version__ < "2.15", reason="torch.compile takes no name before")
@pytest.mark.parametrize("by_block", [False, True])
def test_a_region_is_logged_by_its_name(by_block: bool, caplog: pytest.LogCaptureFixture) -> None:
    blocks = (nn.Sequential(nn.Linear(320, 320), nn.GELU()) for _ in range(2))
    model = nn.Sequential(*blocks).requires_grad_(False)
    options = {"method": "int8", "compiler": "eager"}
    with caplog.at_level(logging.INFO, "omniq"):
        if by_block:
            omniq.compile(model, options, name="mine")(torch.randn(5, 320))
        else:
            torch.compile(model, backend="omniq", options=options, name="mine")(torch.randn(5, 320))
    assert "region mine" in caplog.messages
