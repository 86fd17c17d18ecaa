"""The page in a real browser: it opens, filters and shows code, whatever a model is called."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, NO_BROWSER, drive
from torch import nn

from omniq_compile.inspector.generated import GeneratedCode, pieces
from omniq_compile.inspector.inspection import Inspection, inspect
from omniq_compile.inspector.page import human_size, render_page, tree

EVIL = "<script>hacked = 1</script>"
QUOTES = """"' onmouseover="hacked = 2" x='&lt;"""
BLOCKS = 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module(EVIL, nn.Linear(70, 70))
        self.add_module(QUOTES, nn.Linear(70, 70, bias=False))
        self.out = nn.Linear(70, 70)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (getattr(self, name) for name in (EVIL, QUOTES))
        return x + self.out(torch.relu(second(torch.relu(first(x)))))


# A class may be called anything too.
Evil = type("<img src=x onerror=hacked=3>", (Block,), {})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(38, 70)
        self.blocks = nn.ModuleList(Evil() for _ in range(BLOCKS))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    torch._dynamo.reset()
    options = {"method": "int8", "min_features": 1, "ignored_layers": ["first"]}
    name = f"{EVIL}{QUOTES}"
    return inspect(name, Model(), (torch.randn(5, 38),), options, kernels=True)


@pytest.fixture(scope="module")
def page(inspection: Inspection) -> str:
    return render_page(inspection)


SCRIPT = """
const rows = () => shown(".site > summary").length;
result.title = document.querySelector("h1").textContent;
result.parts = shown(".part > summary .name").map((node) => node.textContent);
result.times = shown(".times").map((node) => node.textContent);
result.kinds = shown(".part > summary .kind").map((node) => node.textContent);
result.rows = rows();
result.names = shown(".site > summary .name").map((node) => node.textContent);

// A click opens a site, and shows its program before and after.
const site = document.querySelector(".part:last-of-type .site");
result.before_click = visible(site.querySelector(".pair"));
site.querySelector("summary").click();
result.after_click = visible(site.querySelector(".pair"));
result.code = [...site.querySelectorAll(".pair pre")].map((pre) => pre.textContent);
result.detail = site.querySelector("dl").textContent;

// A click folds a part away, and another brings it back.
const part = document.querySelector(".part");
part.querySelector("summary").click();
result.rows_folded = rows();
part.querySelector("summary").click();

// The filter hides rows, and parts without any.
type("FIRST kept");
result.filtered = rows();
result.filtered_parts = shown(".part > summary").length;
result.count = document.getElementById("shown").textContent;
type("no such layer");
result.nothing = [rows(), visible(document.getElementById("nothing"))];
document.getElementById("clear").click();
result.cleared = rows();
const which = document.getElementById("which");
which.value = "low";
which.dispatchEvent(new Event("change"));
result.low = rows();
which.value = "";
which.dispatchEvent(new Event("change"));

// Generated code is behind two clicks.
const kernels = document.querySelector(".part:last-of-type .kernels");
const piece = kernels.querySelector(".piece");
result.code_before = visible(piece.querySelector("pre"));
kernels.querySelector("summary").click();
piece.querySelector("summary").click();
result.code_after = visible(piece.querySelector("pre"));
result.source = piece.querySelector("pre").textContent;
result.pieces = [...kernels.querySelectorAll(".piece > summary code")].map((c) => c.textContent);

document.getElementById("close").click();
result.closed = rows();
document.getElementById("open").click();
result.opened = rows();
const elements = (name) => document.querySelectorAll(name).length;
result.elements = ["img", "script", "link", "iframe"].map(elements);
result.handlers = document.querySelectorAll("[onmouseover], [onerror]").length;
result.hacked = String(window.hacked);
"""


@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
def test_the_page_in_a_browser(page: str, tmp_path: Path) -> None:
    found = drive(page, SCRIPT, tmp_path)
    assert found["errors"] == []
    assert found["requests"] == []
    assert found["hacked"] == "undefined"
    # The page's script and the test's own, and no element from a name.
    assert (found["elements"], found["handlers"]) == ([0, 2, 0, 0], 0)
    # Every name is there to read, as it is.
    assert found["title"] == f"{EVIL}{QUOTES}"
    assert found["parts"] == ["outside the blocks", f"blocks.0 to blocks.{BLOCKS - 1}"]
    assert (found["times"], found["kinds"]) == (
        [f"\N{MULTIPLICATION SIGN} {BLOCKS}"],
        [Evil.__name__],
    )
    assert (found["rows"], found["names"]) == (4, ["first", EVIL, QUOTES, "out"])
    assert (found["before_click"], found["after_click"]) == (False, True)
    assert ["linear(" in text for text in found["code"]] == [True, False]
    assert ["omniq.gemm" in text for text in found["code"]] == [False, True]
    for word in (f"blocks.0.{EVIL}", f"19,600 → 5,180, in each of {BLOCKS} blocks", "cpu_s8_"):
        assert word in found["detail"]
    assert found["rows_folded"] == 3
    assert (found["filtered"], found["filtered_parts"], found["count"]) == (1, 1, "1 of 4")
    assert (found["nothing"], found["cleared"], found["low"]) == ([0, True], 4, 3)
    assert (found["code_before"], found["code_after"]) == (False, True)
    assert 'extern "C"' in found["source"]
    assert found["pieces"][-1] == "call"
    assert (found["closed"], found["opened"]) == (0, 4)


class _Reader(HTMLParser):
    """Collects what a page could load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = {"src", "href", "action", "srcset", "data"}
        self.references += [f"{k}={v}" for k, v in attrs if k in loading or k.startswith("on")]


def test_the_page_refers_to_nothing_and_is_small(page: str) -> None:
    reader = _Reader()
    reader.feed(page)
    assert reader.references == []
    assert (reader.tags.count("script"), reader.tags.count("img")) == (1, 0)
    assert re.search(r"""content="default-src 'none'; [^"]*script-src 'sha256-""", page)
    assert "url(" not in page
    assert "@import" not in page
    # The blocks are shown once.
    assert page.count('<details class="site') == 4
    assert len(page) < 200_000


def test_why_there_is_no_generated_code_is_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(38, 70))
    options = {"method": "int8", "min_features": 1}
    for changed, target, words in (
        ({"compiler": "eager"}, None, "which generates none"),
        ({}, "rocm:gfx942", "for rocm:gfx942 only where there is one. The lowered program is"),
        ({"inductor": {"max_autotune": True}}, "cuda:sm_90", "max_autotune times kernels on the"),
        ({"mode": "max-autotune"}, "cuda:sm_90", "max_autotune times kernels on the device"),
    ):
        found = inspect("m", model, (torch.randn(5, 38),), options | changed, target=target,
                        kernels=True)  # fmt: skip
        assert found.no_kernels is not None
        assert words in found.no_kernels
        assert [part.kernels for part in found.parts] == [None]
        page = render_page(found).replace("&#39;", "'")
        assert words in page
        # The device code that the target would run is there all the same, escaped.
        assert ("lowering/triton_kernels/row_scaled_gemm.py" in page) == (target is not None)
        assert ("@triton.jit" in page) == (target is not None)


def test_sites_stand_in_the_order_in_which_they_run(inspection: Inspection) -> None:
    def names(entry: Any) -> Any:
        return [entry.name, *map(names, getattr(entry, "entries", []))]

    views = inspection.parts[0].sites
    layers = ["a.b.c", "x", "a.b.d", "a.e", "y.0.z"]
    renamed = [type(views[0])(views[0].site, layer, {}) for layer in layers]
    assert names(tree(renamed)) == [
        "", ["a", ["b", ["c"], ["d"]], ["e"]], ["x"], ["y.0.z"],
    ]  # fmt: skip


def test_an_unknown_form_of_generated_code_is_shown_whole() -> None:
    text = "something = new()\n"
    assert pieces(text) == [GeneratedCode("program", "Python", text)]


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (73_728, "73.7 kB"),
     (442_368, "442 kB"), (40_861_000_000, "40.9 GB"), (5e12, "5000 GB")],
)  # fmt: skip
def test_sizes_are_worded(count: int | None, text: str) -> None:
    assert human_size(count) == text
