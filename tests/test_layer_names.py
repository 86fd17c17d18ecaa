"""What a layer is called: the same where its block is compiled alone as in the whole model."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE

import omniq_compile
from omniq_compile import explain
from omniq_compile.compiling.regional import block_config
from omniq_compile.model_blocks import module_blocks
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.layer_names import layer_name, possible_names
from omniq_compile.planning.folded_trace import folded_sites
from omniq_compile.planning.meta_run import run_on_meta

WIDTH = 64
OPTIONS = {"method": "int8", "min_features": 1, "compiler": "eager", "matmul": True}


def matrix() -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH) / WIDTH**0.5


class Attention(nn.Module):
    """As `nn.MultiheadAttention` it holds one projection itself, and another in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.cat([matrix() for _ in range(3)]))
        self.norm = nn.LayerNorm(WIDTH)
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = F.linear(self.norm(x), self.in_proj_weight).chunk(3, dim=-1)
        return self.out_proj((q @ k.transpose(-1, -2) / WIDTH**0.5).softmax(-1) @ v)


class Joined(nn.Module):
    """Two weights in one product, which the module is named for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = F.linear(x, torch.cat([self.up.weight, self.gate.weight])).chunk(2, -1)
        return up * gate


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix())
        self.flat = nn.Parameter(matrix().flatten())
        self.register_buffer("table", matrix())
        self.scales = nn.ParameterList([matrix()])
        self.attn = Attention()
        self.joined = Joined()
        self.net = nn.Sequential(nn.Linear(WIDTH, 96), nn.Sequential(nn.Linear(96, WIDTH)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        x = x + F.linear(x, self.weight) + x @ self.table + x @ self.scales[0]
        x = x + x @ self.flat.unflatten(0, (WIDTH, WIDTH)) + self.joined(x)
        return self.net(x + (x @ x.transpose(-1, -2)).softmax(-1))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.stack.blocks:
            x = block(x)
        return x


# As many tokens as features, so that the product in the block itself can be added.
TOKENS = WIDTH

# The layers of one block, in the order it runs them; "" is the block.
INSIDE = [
    "attn.in_proj_weight", "attn", "attn", "attn.out_proj", "", "table", "scales.0", "flat",
    "joined", "", "net.0", "net.1.0",
]  # fmt: skip


def model() -> Model:
    return Model().eval().requires_grad_(False)


def whole_layers(**options: Any) -> list[str]:
    report = explain(model(), (torch.randn(TOKENS, WIDTH),), OPTIONS | options)
    return [site.layer for site in report.kept]


def test_the_whole_model_shows_these_names() -> None:
    places = [f"stack.blocks.{index}" for index in range(2)]
    expected = [f"{place}.{name}".rstrip(".") for place in places for name in INSIDE]
    assert whole_layers(ignored_layers=["re:.*"]) == expected


def test_the_names_of_a_block_are_known_before_it_is_traced() -> None:
    block, place = model().stack.blocks[1], "stack.blocks.1"
    own = [s.layer for s in explain(block, (torch.randn(TOKENS, WIDTH),), OPTIONS).sites]
    full = [f"{place}.{name}".rstrip(".") for name in INSIDE]
    assert own == [name if i != 4 else "weight" for i, name in enumerate(INSIDE)]
    assert set(zip(own, full, strict=True)) <= set(possible_names(block, place))


def test_a_wrapped_or_shared_module_has_the_names_that_dynamo_gives() -> None:
    shared = nn.Linear(WIDTH, WIDTH)
    outer = nn.ModuleDict({"a": shared, "b": shared, "c": torch.compile(nn.Linear(3, 3))})
    names = [full for _, full in possible_names(outer, "_orig_mod.x")]
    assert set(names) == {"x", "x.a", "x.b", "x.c"}


def test_a_plan_names_layers_as_a_trace_does() -> None:
    on_meta = model().to("meta")
    inputs = {"x": torch.randn(TOKENS, WIDTH, device="meta")}
    blocks = module_blocks(on_meta)
    sites = folded_sites(on_meta, inputs, blocks, run_on_meta(on_meta, inputs, blocks))
    assert [site.layer for site in sites] == whole_layers(ignored_layers=["re:.*"])


def output(how: str, **options: Any) -> torch.Tensor:
    """Call the same model with the same input, compiled whole or by its blocks."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    original, x = model(), torch.randn(TOKENS, WIDTH)
    options = OPTIONS | options
    if how == "whole":
        return torch.compile(original, backend="omniq", options=options)(x)
    return omniq_compile.compile(original, options)(x)


@pytest.fixture(scope="module")
def unnamed() -> dict[str, torch.Tensor]:
    """What comes out where no pattern names a layer."""
    return {method: output("blocks", method=method) for method in ("int8", "mxfp4")}


@pytest.mark.parametrize(
    ("pattern", "names_some"),
    [
        ("attn", True),
        ("in_proj_weight", True),
        ("blocks.1.attn.in_proj_weight", True),
        ("attn.out_proj", True),
        ("re:.*attn", True),
        (r"re:stack\.blocks\.0", True),
        (r"re:.*blocks\.1\..*", True),
        ("blocks.0", True),
        ("re:.*", True),
        ("table", True),
        (r"re:.*blocks\.1\.scales\.0", True),
        ("flat", True),
        ("joined", True),
        (r"re:.*\.\d+\.net\.1\.0", True),
        # These name what is no layer: a part of a product's weight, a module that multiplies
        # nothing, and a weight that goes by its module's name.
        ("up", False),
        ("re:.*net", False),
        ("weight", False),
    ],
)
def test_blocks_keep_what_the_whole_model_keeps(
    pattern: str, names_some: bool, unnamed: dict[str, torch.Tensor]
) -> None:
    whole, blocks = (output(how, ignored_layers=[pattern]) for how in ("whole", "blocks"))
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-5)
    assert bool((blocks - unnamed["int8"]).abs().max() > 1e-3) == names_some


@pytest.mark.parametrize("pattern", ["blocks.1.attn", r"re:stack\.blocks\.0"])
def test_blocks_widen_the_activations_that_the_whole_model_widens(
    pattern: str, unnamed: dict[str, torch.Tensor]
) -> None:
    options = {"method": "mxfp4", "w4a8_fallback_layers": [pattern]}
    whole, blocks = (output(how, **options) for how in ("whole", "blocks"))
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-5)
    assert (blocks - unnamed["mxfp4"]).abs().max() > 1e-3


def warnings(caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    with caplog.at_level(logging.WARNING, "omniq"):
        omniq_compile.compile(model(), OPTIONS | options)
    return [r.getMessage() for r in caplog.records if r.name == "omniq"]


@pytest.mark.parametrize("option", ["ignored_layers", "w4a8_fallback_layers"])
def test_a_pattern_of_what_is_no_leaf_is_known(
    option: str, caplog: pytest.LogCaptureFixture
) -> None:
    patterns = ["attn.in_proj_weight", "re:.*scales.0", "re:.*attn", "table", r"re:.*blocks\.1"]
    assert warnings(caplog, method="mxfp4", **{option: patterns}) == []


@pytest.mark.parametrize("name", ["attn.out_proj.bias", "attn.out_proj.weight"])
def test_a_parameters_name_names_no_layer(name: str, caplog: pytest.LogCaptureFixture) -> None:
    (text,) = warnings(caplog, ignored_layers=[name])
    assert f"pattern {name!r} matches no layer of the model; nearest: " in text
    nearest = text.partition("nearest: ")[2].split(", ")
    assert "attn.out_proj" in nearest
    assert not any(layer.endswith(".bias") for layer in nearest)


def test_a_pattern_that_ends_at_a_module_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Between activations nothing is quantized here, so that it would keep nothing."""
    patterns = [r"re:.*\.0\.attn", r"re:.*blocks\.1", "re:.*attn.*", "attn", "re:.*net.1.0"]
    (text,) = warnings(caplog, matmul=False, ignored_layers=patterns)
    start, _, wider = text.partition("; ")
    assert start.startswith(f"ignored_layers pattern {patterns[0]!r} names stack.blocks.0.attn, ")
    caplog.clear()
    wider = wider.split("'")[1].replace("\\\\", "\\")
    assert warnings(caplog, matmul=False, ignored_layers=[wider]) == []
    assert set(whole_layers(ignored_layers=[wider])) == {
        f"stack.blocks.0.{name}" for name in INSIDE if name.startswith("attn")
    }


def compiled_each(pattern: str, **options: Any) -> torch.Tensor:
    """Call the model with each block compiled alone, as ``compile_repeated_blocks`` does."""
    each = model()
    for block in module_blocks(each).values():
        block.compile(backend="omniq", options=OPTIONS | options)
    return each(torch.randn(TOKENS, WIDTH))


@pytest.mark.parametrize(
    ("pattern", "layer"),
    [
        ("blocks.1.attn.in_proj_weight", "stack.blocks.1.attn.in_proj_weight"),
        (r"re:stack\..*\.attn", "stack.blocks.0.attn"),
        (r"re:stack\.blocks\.1", "stack.blocks.1"),
        (r"re:.*blocks\.0\.scales\.0", "stack.blocks.0.scales.0"),
    ],
)
def test_a_full_name_of_any_layer_is_refused(pattern: str, layer: str) -> None:
    with pytest.raises(BackendCompilerFailed) as error:
        compiled_each(pattern, ignored_layers=[pattern])
    assert f"names {layer} of Model" in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "more"),
    [
        ("re:.*", {}),
        ("attn", {}),
        ("re:attn.*", {}),
        ("nothing", {}),
        (r"re:.*blocks\.1\.attn\.norm", {}),  # is never quantized
        (r"re:.*blocks\.1\.attn", {"matmul": False}),  # nor are its two products here
    ],
)
def test_what_changes_nothing_is_not_refused(pattern: str, more: dict[str, Any]) -> None:
    assert compiled_each(pattern, ignored_layers=[pattern], **more).isfinite().all()


def test_a_name_that_is_no_identifier() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in NAMES})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.rows.values():
                x = layer(x)
            return self.rows["x-y"](x)

    NAMES = ["a b", "x-y", "2", "f(x), 'z'"]
    sites = explain(Named(), (torch.randn(TOKENS, WIDTH),), OPTIONS).sites
    assert [site.layer for site in sites] == [f"rows.{name}" for name in [*NAMES, "x-y"]]


class Sharing(nn.Module):
    """One weight in two layers, and one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.again = nn.Linear(WIDTH, WIDTH)
        self.once_more = self.again
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.once_more(self.again(self.second(self.first(x))))


def test_layers_that_share_a_weight_are_known_by_names_of_their_own() -> None:
    x = torch.randn(TOKENS, WIDTH)
    sites = explain(Sharing(), (x,), OPTIONS).sites
    assert [site.layer for site in sites[:3]] == ["first", "second", "again"]
    for layer in ("first", "second"):
        config = QuantConfig.from_options(OPTIONS | {"ignored_layers": [f"block.{layer}"]})
        in_block = block_config(config, "block", Sharing(), 0).ignored_layers
        for patterns in ([layer], list(in_block)):
            options = OPTIONS | {"ignored_layers": patterns}
            kept = [site.layer for site in explain(Sharing(), (x,), options).kept]
            assert kept == [layer]


@pytest.mark.parametrize(
    ("layer", "kept"),
    [
        ("first", ["first", "second"]),
        ("second", ["first", "second"]),
        ("again", ["again"]),
        ("once_more", ["again"]),
    ],
)
def test_a_stored_weight_is_kept_by_each_name_of_its_layers(layer: str, kept: list[str]) -> None:
    """It has one form for all of them."""
    rows = omniq_compile.quantize_(Sharing(), OPTIONS | {"ignored_layers": [layer]})
    assert [row.layer for row in rows if row.method is None] == kept
    assert [row.layer for row in rows] == ["first", "second", "again"]


def test_what_fsdp_wraps_a_module_in_is_no_part_of_a_name() -> None:
    name = f"blocks.0.{FSDP_WRAPPED_MODULE}.q"
    assert layer_name([f"{name}.weight"], "") == layer_name([], name) == "blocks.0.q"


def test_a_function_that_is_given_a_method_names_layers_as_the_model_does() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)

    def run(call: Any, x: torch.Tensor) -> Any:
        return call(x)

    options = {"method": "int8", "min_features": 1, "compiler": "eager", "ignored_layers": ["re:0"]}
    x = torch.randn(5, 64)
    assert torch.equal(
        torch.compile(run, backend="omniq", options=options)(model.forward, x), model(x)
    )
