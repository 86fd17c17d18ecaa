"""Repeated blocks are printed once, and what is printed runs and computes the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS, stage_inputs, traced
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from omniq_compile import QuantConfig
from omniq_compile.inspector.inspection import inspect
from omniq_compile.lowering.target import Target
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context
from omniq_compile.passes.printing.folding import FoldedGraph, fold, ranges
from omniq_compile.passes.printing.node_words import identifier, relative, weight_of
from omniq_compile.passes.printing.program import module_text
from omniq_compile.passes.printing.sections import restrict, split

STAGES = ("traced", "quantized", "lowered")


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Any, shift: Any) -> Any:
        return x + self.down(F.gelu(self.up(self.norm(x) + shift)))


class Model(nn.Module):
    def __init__(self, hidden: tuple[int, ...] = (70, 70, 70, 70), skip: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(38, 26)
        self.blocks = nn.ModuleList(Block(26, h) for h in hidden)
        self.last = nn.Linear(26, 19)
        self.skip = skip
        self.requires_grad_(False)

    def forward(self, x: Any, shift: Any) -> Any:
        start = x = self.first(x)
        kept = []
        for block in self.blocks:
            x = block(x, shift)
            kept.append(x)
        if self.skip:
            x = x + kept[1]
        return self.last(x + start)


def stages_of(model: nn.Module, **options: Any) -> tuple[fx.GraphModule, list[Any], Context]:
    ((gm, inputs),) = traced(model, torch.randn(2, 7, 38), torch.randn(26))
    config = QuantConfig.from_options(OPTIONS | options)
    context = Context(config, Target("cpu", "generic"), stages={})
    pipeline.run(gm, context)
    return gm, inputs, context


def text_of(folded: FoldedGraph, stage: str) -> str:
    functions = [block.print(stage)[0] for block in folded.blocks()]
    return module_text([*functions, folded.print(stage)[0]], stage)


def execute(folded: FoldedGraph, stage: str, values: list[Any]) -> list[Any]:
    """Run a folded program: its weights go in as one dict a block, by their names."""
    namespace: dict[str, Any] = {}
    exec(compile(text_of(folded, stage), "program", "exec"), namespace)
    placeholders = [n for n in folded.stages[stage].graph.nodes if n.op == "placeholder"]
    given = dict(zip(placeholders, values, strict=True))
    containers: dict[str, dict[int, dict[str, Any]]] = {}
    taken = set()
    for section in folded.sections[stage]:
        if section.block:
            container, _, number = section.block.rpartition(".")
            containers.setdefault(container, {})[int(number)] = {
                identifier(relative(str(weight_of(n)), section.block)): given[n]
                for n in section.weights
            }
            taken |= set(section.weights)
    arguments = [given[n] for n in placeholders if n not in taken]
    arguments += [[c[i] for i in range(len(c))] for c in containers.values()]
    with torch.no_grad():
        return tree_leaves(namespace["forward"](*arguments))


def check(model: nn.Module, **options: Any) -> tuple[FoldedGraph, str]:
    """The folded text computes what the whole graph does, at every stage; returns it quantized."""
    gm, inputs, context = stages_of(model, **options)
    assert context.stages is not None
    (folded,) = fold([context.stages])
    for stage in STAGES:
        graph = context.stages[stage]
        values = stage_inputs(graph, gm, inputs, context)
        with torch.no_grad():
            expected = tree_leaves(graph(*values))
        assert all(map(torch.equal, execute(folded, stage, values), expected))
    return folded, text_of(folded, "quantized")


def test_equal_blocks_are_one_function_called_in_a_loop() -> None:
    folded, text = check(Model())
    assert [(b.label, b.kind, len(b.members)) for b in folded.blocks()] == [
        ("blocks.0 to blocks.3", "Block", 4)
    ]
    assert text.count("\ndef ") == 2
    assert text.count("torch.ops.omniq.gemm.default(") == 2 + 2  # a block's, and outside
    loop = r"    (x\w*) = start\n    for weights in blocks:  # x 4\n        \(\1,\) = block\(\1, "
    assert re.search(loop, text)
    # The block's own names: layers, weights and variables, from one on.
    for line in ("# up\n", "    up_codes,  # i8[70, 26]\n", "    # norm\n", "    *,\n"):
        assert line in text
    assert "blocks_0" not in text


@pytest.mark.parametrize(
    ("model", "options", "labels"),
    [
        (Model((70, 70, 54, 70)), {}, ["blocks.0 to blocks.1, blocks.3", "blocks.2"]),
        (Model(), {"ignored_layers": ["blocks.1"]}, ["blocks.0, blocks.2 to blocks.3", "blocks.1"]),
        (Model(), {"ignored_layers": ["re:blocks[.][01][.]up"]},
         ["blocks.0 to blocks.1", "blocks.2 to blocks.3"]),
        (Model((70, 54, 38)), {}, ["blocks.0", "blocks.1", "blocks.2"]),
    ],
)  # fmt: skip
def test_blocks_that_differ_are_shown_apart(
    model: nn.Module, options: dict[str, Any], labels: list[str]
) -> None:
    folded, text = check(model, **options)
    assert [block.label for block in folded.blocks()] == labels
    assert text.count("\ndef ") == 1 + len(labels)


def test_a_result_that_is_read_later_is_not_lost_in_a_loop() -> None:
    folded, text = check(Model(skip=True))
    assert len(folded.blocks()) == 1
    assert "for weights in" in text
    # The loops end and begin anew at the second block, whose result is read again at the end.
    assert len(re.findall(r"[( ]block\(\w+, shift, ", text)) == 2


def test_a_block_called_twice_is_not_folded() -> None:
    class Twice(Model):
        def forward(self, x: Any, shift: Any) -> Any:
            x = self.first(x)
            for _ in range(2):
                for block in self.blocks:
                    x = block(x, shift)
            return self.last(x)

    folded, text = check(Twice((70, 70)))
    assert folded.blocks() == []
    assert text.count("\ndef ") == 1


def test_sections_hold_every_node_once() -> None:
    _, _, context = stages_of(Model())
    assert context.stages is not None
    for gm in context.stages.values():
        inside = [node for section in split(gm) for node in section.nodes]
        expected = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
        assert inside == expected


@pytest.mark.parametrize(
    ("pattern", "gemms", "words", "absent"),
    [
        # The gelu feeds it, and the product before that is an input.
        ("blocks.1.down", 1, ["gelu"], ["layer_norm", "blocks_1_up_codes"]),
        ("up", 4, ["layer_norm"], ["gelu"]),
        ("last", 1, ["last_codes"], ["layer_norm"]),
        ("blocks.*", 8, ["gelu", "layer_norm"], ["first_codes", "last_codes"]),
    ],
)
def test_a_pattern_keeps_its_layers_and_what_feeds_them(
    pattern: str, gemms: int, words: list[str], absent: list[str]
) -> None:
    _, _, context = stages_of(Model())
    assert context.stages is not None
    gm = restrict(context.stages["quantized"], pattern)
    gm.graph.lint()
    text = module_text([FoldedGraph({"s": gm}, {"s": []}, {}).print("s")[0]])
    assert text.count("torch.ops.omniq.gemm.default(") == gemms
    assert [word for word in words if word not in text] == []
    assert [word for word in absent if word in text] == []


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["b.0", "b.1", "b.2"], "b.0 to b.2"),
        (["b.0", "b.2", "b.3", "c.4"], "b.0, b.2 to b.3, c.4"),
        (["b.59"], "b.59"),
    ],
)
def test_ranges_of_names(names: list[str], text: str) -> None:
    assert ranges(names) == text


def test_sites_of_folded_blocks_have_bytes_and_code() -> None:
    options = OPTIONS | {"ignored_layers": ["last"]}
    inputs = (torch.randn(2, 7, 38), torch.randn(26))
    found = inspect("m", Model(), inputs, options, target="cpu:generic")
    outside, blocks = found.parts
    assert (outside.count, blocks.count) == (1, 4)
    assert [view.layer for view in outside.sites] == ["first", "last"]
    up, down = blocks.sites
    assert (up.layer, up.site.layer, down.layer) == ("up", "blocks.0.up", "down")
    # float32 before; one byte and a float32 scale per row after.
    assert (up.site.weight_bytes_before, up.site.weight_bytes_after) == (
        70 * 26 * 4,
        70 * 26 + 70 * 4,
    )
    last = outside.sites[1].site
    assert last.weight_bytes_before == last.weight_bytes_after == 19 * 26 * 4
    assert up.code["traced"].startswith("linear = torch._C._nn.linear(")
    lines = up.code["quantized"].splitlines()
    assert ["omniq.quantize" in lines[0], "omniq.gemm" in lines[1], len(lines)] == [True, True, 2]
    assert up.code["lowered"].splitlines()[-1].partition(" = ")[0] == "linear"
    assert "torch.ops.omniq.gemm" not in up.code["lowered"]
    whole = sum(
        (v.site.weight_bytes_after or 0) * p.count
        for p in found.parts
        for v in p.sites
        if v.site.decision.method
    )
    assert whole == found.report.weight_bytes_after
