"""How ``ignored_layers`` names layers, and what is said of a pattern that names none."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import OPTIONS, compiled
from torch import nn

from omniq_compile import QuantConfig, denoise_step, explain, quantize_
from omniq_compile.compiling.regional import block_config
from omniq_compile.passes.patterns import first_match, matches, unmatched

LAYER = "transformer_blocks.3.img_mlp.net.2"


@pytest.mark.parametrize(
    "pattern",
    [
        LAYER,
        "transformer_blocks",
        "transformer_blocks.3",
        "img_mlp",
        "img_mlp.net",
        "net.2",
        "3",
        "img_*",
        "img_ml?",
        "transformer_blocks.*.img_mlp",
        "*.net.[12]",
        "re:transformer_blocks\\.[0-3]\\..*",
        "re:.*mlp.*",
    ],
)
def test_a_pattern_matches_the_full_name_or_a_run_of_its_parts(pattern: str) -> None:
    assert matches(pattern, LAYER)


@pytest.mark.parametrize(
    "pattern",
    [
        "img_ml",  # a part, not the beginning of one
        "mlp",
        "net.0",
        "img_mlp.2",  # not in a row
        "3.2",
        "blocks.3",
        LAYER + ".weight",
        "x." + LAYER,
        "IMG_MLP",
        "img_mlp?",
        "transformer_blocks.*.net",  # * stays inside one part
        "transformer_blocks*2",
        "re:img_mlp",  # has to match the whole name
        "re:.*mlp",
        "",
    ],
)
def test_a_pattern_does_not_match_by_accident(pattern: str) -> None:
    assert not matches(pattern, LAYER)


def test_neighbours_of_a_name_are_told_apart() -> None:
    layers = ["b.1.img_mod.1", "b.1.img_mod2.1", "b.10.img_mod.1", "b.1.txt_img_mod.1"]
    assert [matches("img_mod", layer) for layer in layers] == [True, False, True, False]
    assert [matches("b.1", layer) for layer in layers] == [True, True, False, True]
    assert [matches("b.1*", layer) for layer in layers] == [True, True, True, True]


def test_the_first_match_is_named() -> None:
    assert first_match(("attn", "img_*", "net"), LAYER) == "img_*"
    assert first_match(("attn",), LAYER) is None
    assert first_match((), LAYER) is None


def test_an_unmatched_pattern_comes_with_the_nearest_names() -> None:
    layers = ["blocks.0.attn.to_q", "blocks.0.img_mlp.net.2"]
    found = unmatched(["to_q", "img_mpl", "attn.to_k", "re:.*zzz"], layers)
    assert list(found) == ["img_mpl", "attn.to_k", "re:.*zzz"]
    assert found["img_mpl"][0] == "img_mlp"
    assert found["attn.to_k"][0] == "attn.to_q"
    assert all(len(names) <= 3 for names in found.values())
    assert unmatched(["anything"], []) == {"anything": []}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"img_mod": nn.Linear(38, 19), "img_mod2": nn.Linear(19, 38)})
            for _ in range(2)
        )
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["img_mod2"](block["img_mod"](x))
        return x


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ([], []),
        (["img_mod"], ["blocks.0.img_mod", "blocks.1.img_mod"]),
        (["blocks.1"], ["blocks.1.img_mod", "blocks.1.img_mod2"]),
        (["blocks.0.img_mod2"], ["blocks.0.img_mod2"]),
        (["re:.*2", "0.img_mod"], ["blocks.0.img_mod", "blocks.0.img_mod2", "blocks.1.img_mod2"]),
        (["*"], [f"blocks.{i}.{name}" for i in (0, 1) for name in ("img_mod", "img_mod2")]),
    ],
)
def test_ignored_layers_keeps_exactly_these(patterns: list[str], kept: list[str]) -> None:
    model, x = Model(), torch.randn(7, 38)
    report = explain(model, (x,), OPTIONS | {"ignored_layers": patterns})
    assert [site.layer for site in report.kept] == kept
    assert len(report.sites) == 4
    assert {site.decision.reason for site in report.kept} <= {f"ignored by {p!r}" for p in patterns}
    assert report.unmatched == {}
    if len(kept) == 4:
        assert torch.equal(compiled(model, ignored_layers=patterns)(x), model(x))


def test_a_full_name_keeps_no_layer_of_its_block_that_ends_like_it() -> None:
    block = nn.ModuleDict({"proj": nn.Linear(3, 3), "attn": nn.ModuleDict()})
    block["attn"]["proj"] = nn.Linear(3, 3)
    config = QuantConfig("int8", ignored_layers=("blocks.2.proj",))
    kept = block_config(config, "blocks.2", block, 2).ignored_layers
    assert first_match(kept, "proj") is not None
    assert first_match(kept, "attn.proj") is None


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (["attn"], [r"re:attn(\..*)?"]),
        (["to_q", "re:.*proj"], [r"re:attn\.to_q(\..*)?", r"re:proj"]),
        (["attn", "to_q", r"re:.*to_q\.weight"], [r"re:attn(\..*)?"]),
        ([r"re:.*attn"], [r"re:attn"]),
        (["blocks.2"], ["re:.*"]),
        (["blocks.1"], []),
    ],
)
def test_a_plain_name_means_what_is_below_it_when_that_comes_later(
    patterns: list[str], kept: list[str]
) -> None:
    block = nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(3, 3)})})
    block["proj"] = nn.Linear(3, 3)
    config = QuantConfig("int8", ignored_layers=tuple(patterns))
    assert list(block_config(config, "blocks.2", block, 2).ignored_layers) == kept


def test_a_product_without_a_weight_is_named_by_its_module_and_index() -> None:
    class Scores(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.transpose(-1, -2)

    blocks = nn.ModuleList(Scores() for _ in range(3))

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    options = OPTIONS | {"matmul": True, "ignored_layers": ["blocks.1"]}
    report = explain(Blocks(), (torch.randn(7, 38),), options)
    assert [site.layer for site in report.sites] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [site.layer for site in report.kept] == ["blocks.1"]


def test_a_pattern_that_matches_nothing_is_reported_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Model(), torch.randn(7, 38)
    options = {"ignored_layers": ["img_mods", "zzz", "blocks.1"]}
    report = explain(model, (x,), OPTIONS | options)
    assert list(report.unmatched) == ["img_mods", "zzz"]
    assert "img_mod" in report.unmatched["img_mods"]

    with caplog.at_level(logging.WARNING, logger="omniq"):
        compiled(model, **options)(x)
    assert {r.levelno for r in caplog.records if r.name == "omniq"} == {logging.WARNING}
    near, far = warnings(caplog)
    assert near.startswith("ignored_layers pattern 'img_mods' matches none of this graph's 4")
    assert "img_mod2" in near
    # Where no name is near, the first three.
    assert far.endswith("; nearest: blocks.0.img_mod, blocks.0.img_mod2, blocks.1.img_mod")


def test_matched_patterns_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="omniq"):
        compiled(Model(), ignored_layers=["img_mod"])(torch.randn(7, 38))
    assert [r for r in caplog.records if r.name == "omniq"] == []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "omniq"]


def test_a_regular_expression_that_ends_above_layers_is_told_of_but_at_a_wrapped_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = Model()
    model = nn.Sequential(nn.ModuleDict({"_orig_mod": inner}))
    for block in inner.blocks:
        adapter = nn.ModuleDict({"default": nn.Linear(38, 4)})
        block["img_mod"] = nn.ModuleDict({"base_layer": block["img_mod"], "lora_A": adapter})
    inner.same_blocks, inner.act = inner.blocks, nn.GELU()
    fine = [r"re:.*\.img_mod", r"re:.*same_blocks\.0\.img_mod", "re:.*act", "re:"]
    quantize_(model, OPTIONS | {"ignored_layers": [*fine, r"re:.*blocks\.1"]})
    (text,) = warnings(caplog)
    assert text == (
        r"ignored_layers pattern 're:.*blocks\\.1' names 0.blocks.1, and none of the layers in it; "
        r"'re:(.*blocks\\.1)(\\..*)?' names them too"
    )
    assert type(inner.blocks[0]["img_mod"]["base_layer"].weight) is nn.Parameter


def test_every_option_that_names_layers_is_reported_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where the activations depend on the step, the graph is compiled twice."""
    model, x = Model(), torch.randn(7, 38)
    options = {"method": "mxfp4", "ignored_layers": ["img_mods"], "w4a8_fallback_steps": [0]}
    options |= {"w4a8_fallback_layers": ["img_nod", "img_mod2"]}
    report = explain(model, (x,), OPTIONS | options)
    assert list(report.unmatched) == ["img_mods", "img_nod"]
    assert all(near[0].startswith("img_mod") for near in report.unmatched.values())

    with caplog.at_level(logging.WARNING, logger="omniq"), denoise_step(1):
        compiled(model, **options)(x)
    starts = ["ignored_layers pattern 'img_mods'", "w4a8_fallback_layers pattern 'img_nod'"]
    assert [text.partition(" matches")[0] for text in warnings(caplog)] == starts


def test_a_graph_without_layers_says_nothing_of_patterns(caplog: pytest.LogCaptureFixture) -> None:
    """As what a break leaves before the first layer: the graph with layers says it."""
    layer = nn.Linear(38, 44).requires_grad_(False)

    def behind_a_break(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return layer(y)

    options = OPTIONS | {"ignored_layers": ["img_mods"]}
    with caplog.at_level(logging.WARNING, logger="omniq"):
        torch.compile(behind_a_break, backend="omniq", options=options)(torch.randn(7, 38))
    (text,) = warnings(caplog)
    assert "none of this graph's 1 layers" in text


def test_a_name_is_its_own_pattern_whatever_letters_it_has() -> None:
    assert matches("a[0]", "a[0]")
    assert matches("a[0].b", "x.a[0].b")
    assert matches("to_[qk]", "to_q")
    assert matches("to_[qk]", "to_[qk]")
    assert matches("re:x", "re:x")
