"""A compile in which nothing is quantized says so, once, and only where that is sure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Holder
from torch import nn

import omniq_compile
from omniq_compile import QuantConfig, quantize_
from omniq_compile.backend import omniq

OPTIONS = {"method": "int8", "compiler": "eager"}
X = torch.randn(7, 64)
Layers = Callable[..., nn.Module]


class Chain(nn.Module):
    """Runs its parts one after the other, with a graph break before those that are named."""

    def __init__(self, *blocks: nn.Module, breaks: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.breaks = breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            if number in self.breaks:
                torch._dynamo.graph_break()
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(64, hidden)
        self.down = nn.Linear(hidden, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class WideBlock(Block):
    """Its own class, with one layer that is wide enough."""

    def __init__(self) -> None:
        super().__init__(256)
        self.middle = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.middle(self.up(x)))


class SameNames(Block):
    """Its layers have the names of the others', and one is wide enough."""

    def __init__(self) -> None:
        super().__init__(256)
        self.down = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[:, :64]


class ByMatrix(nn.Module):
    """Multiplies by a parameter of its own, which no `nn.Linear` holds."""

    def __init__(self, shape: tuple[int, ...], equation: str) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(shape))
        self.equation = equation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.nn.functional.pad(x, (0, 256 - x.shape[-1]))
        return torch.einsum(self.equation, wide, self.matrix).flatten(1)[:, :64]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what was warned of since the last question."""

    def ask() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == "omniq" and r.levelno >= 30]
        caplog.clear()
        return found

    return ask


def whole(model: nn.Module, x: torch.Tensor = X, **options: Any) -> Any:
    model.requires_grad_(False)
    return torch.compile(model, backend="omniq", options=OPTIONS | options)(x)


def test_what_keeps_every_layer_is_said_once_with_what_to_change(told: Any) -> None:
    model = Chain(Block(256), Block(100)).requires_grad_(False)
    model.register_buffer("places", torch.zeros(512, 512, dtype=torch.int64))  # no weight
    fast = torch.compile(model, backend="omniq", options=OPTIONS | {"ignored_layers": ["up"]})
    fast(X)
    (text,) = told()
    assert text.startswith("nothing in Chain is quantized: its layers are kept (2 x named by ")
    assert "1 x N = 64 is under min_features = 256" in text
    assert "1 x K = 100 is under min_features = 256" in text
    assert "a smaller 'min_features' or fewer patterns in 'ignored_layers'" in text
    fast(torch.randn(9, 64))  # compiled anew, for any number of rows
    assert told() == []
    whole(model, min_features=65)
    (text,) = told()
    assert "4 x N = 64" not in text
    assert "'ignored_layers'" not in text


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (lambda: Chain(Block(100), WideBlock()), {}),
        (lambda: Chain(Block(100)), {"min_features": 64}),
        (lambda: Chain(nn.LayerNorm(64)), {}),
        # Fourier features of a timestep: angles, which are no layer.
        (lambda: Holder(lambda x, w: x[:, :1] @ w, w=torch.randn(1, 64)), {}),
        # Not by an option: float64 is never quantized.
        (lambda: Holder(lambda x, w: x.double() @ w, w=torch.randn(64, 9).double()), {}),
    ],
)
def test_nothing_is_said_without_need(layers: Layers, options: Any, told: Any) -> None:
    whole(layers(), **options)
    assert told() == []


def test_an_outer_product_is_no_layer_beside_others(told: Any) -> None:
    w, v = torch.randn(1, 64), torch.randn(64, 9)
    whole(Holder(lambda x, w, v: x[:, :1] @ w @ v, w=w, v=v))
    (text,) = told()
    assert "is quantized: its layers are kept (1 x K = 64 is" in text


@pytest.mark.parametrize("blocks", [2, 0])
def test_a_reference_is_kept_by_no_option(blocks: int, told: Any) -> None:
    """As `omniq compare` compiles BF16, by blocks and whole."""
    model = Chain(*(Block(256) for _ in range(blocks or 1))).requires_grad_(False)
    config = dataclasses.replace(QuantConfig.from_options(OPTIONS), keep_all="the reference")
    if blocks:
        omniq_compile.compile(model, config)
    else:
        model.compile(backend=partial(omniq, options=config))
    model(X)
    assert told() == []


def test_products_of_activations_may_be_in_another_graph(told: Any) -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = torch.nn.functional.pad(x, (0, 256 - x.shape[-1])).repeat(40, 1)
            return (wide @ wide.T)[:, :64]

    model = Chain(Block(100), Attention(), breaks=(1,))
    whole(model, matmul=True)
    assert told() == []
    torch._dynamo.reset()
    whole(model)
    assert len(told()) == 1


@pytest.mark.parametrize("breaks", [False, True])
def test_layers_that_the_model_keeps_in_float32_do_not_hide_it(breaks: bool, told: Any) -> None:
    """As Wan's time embedding is; in a graph of its own it would be quantized."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Linear(256, 256)
            self.block = Block(100).bfloat16()

        def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
            x = self.block(x.bfloat16())
            if breaks:
                torch._dynamo.graph_break()
            return x + self.time(step).bfloat16()[:, :64]

    model = Mixed().requires_grad_(False)
    torch.compile(model, backend="omniq", options=OPTIONS)(X, torch.randn(1, 256))
    assert len(told()) == (0 if breaks else 1)


def test_of_several_graphs_one_may_have_small_layers_only(told: Any) -> None:
    for later in (
        WideBlock(),
        ByMatrix((256, 256), "mk,nk->mn"),
        ByMatrix((4, 64, 256), "mk,hnk->mhn"),
        ByMatrix((256, 4, 64), "mk,khn->mhn"),
    ):
        for breaks in ((1,), (1, 2)):
            torch._dynamo.reset()
            whole(Chain(Block(100), later, Block(100), breaks=breaks))
            assert told() == [], later
    torch._dynamo.reset()
    tied = Chain(Block(100), Block(100), breaks=(1,))
    tied.read_by_the_head_too = nn.Embedding(300, 300)
    whole(tied)
    assert told() == []
    torch._dynamo.reset()
    stored = Chain(Block(100), Block(256), breaks=(1,))
    quantize_(stored.blocks[1], OPTIONS | {"min_features": 1})
    whole(stored)
    assert told() == []


def test_several_graphs_without_a_large_layer_say_so_once(told: Any) -> None:
    model = Chain(Block(100), ByMatrix((4, 16, 256), "mk,hnk->mhn"), Block(90), breaks=(1, 2))
    model.unused = nn.Conv2d(3, 256, 16)
    whole(model)
    assert len(told()) == 1
    ignored = Chain(Block(100), WideBlock(), breaks=(1,))
    whole(ignored, ignored_layers=["middle"])
    assert len([text for text in told() if text.startswith("nothing in Chain")]) == 1


def test_blocks_that_are_compiled_one_by_one_are_judged_together(told: Any) -> None:
    def call(model: Chain, *compiled: int) -> list[str]:
        torch._dynamo.reset()
        model.requires_grad_(False)
        for number in compiled:
            model.blocks[number].compile(backend="omniq", options=OPTIONS)
        model(X)
        found: list[str] = told()
        return found

    assert call(Chain(Block(100), Block(100), WideBlock()), 0, 1, 2) == []
    assert call(Chain(Block(100), SameNames()), 0, 1) == []
    assert len(call(Chain(Block(100), Block(100), WideBlock()), 0, 1)) == 1
    assert len(call(Chain(Block(100), Block(90)), 0, 1)) == 1

    torch._dynamo.reset()
    model = Chain(Block(100), WideBlock()).requires_grad_(False)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="omniq", options=OPTIONS)
    model(X)
    assert told() == []


def test_blocks_of_one_call_of_omniqs_compile_are_judged_together(told: Any) -> None:
    def call(*blocks: nn.Module, breaks: tuple[int, ...] = (), **options: Any) -> list[str]:
        torch._dynamo.reset()
        model = Chain(*blocks, breaks=breaks).requires_grad_(False)
        model.head = nn.Linear(300, 300)  # not in a block: it is not compiled
        omniq_compile.compile(model, OPTIONS | options)
        model(X)
        model(X)
        found: list[str] = told()
        return found

    small = [Block(100), Block(100)]
    assert call(*small, WideBlock(), WideBlock()) == []
    (text,) = call(*small)
    assert text.startswith("nothing in Chain is quantized: its layers are kept (1 x K = 64 ")
    (text,) = call(WideBlock(), WideBlock(), ignored_layers=["re:.*middle"])
    assert "named by 'ignored_layers'" in text
    inner = [Chain(Block(100), WideBlock(), breaks=(1,)) for _ in range(2)]
    assert call(*inner) == []
    assert call(*(nn.Sequential(nn.LayerNorm(64)) for _ in range(2))) == []


def test_what_is_stored_quantized_beside_the_blocks_is_quantized(told: Any) -> None:
    model = Chain(WideBlock(), WideBlock()).requires_grad_(False)
    model.head = nn.Linear(300, 300)
    options = OPTIONS | {"ignored_layers": ["re:.*middle"]}
    omniq_compile.quantize_(model, options)
    told()
    omniq_compile.compile(model, options)
    model(X)
    assert told() == []


@pytest.mark.parametrize("blockwise", [False, True])
def test_leading_blocks_that_are_all_there_are(blockwise: bool, told: Any) -> None:
    options = {"method": "mxfp4_dualscale", "compiler": "eager"}
    for num_blocks, expected in ((5, 1), (6, 0)):
        torch._dynamo.reset()
        model = Chain(*(WideBlock() for _ in range(num_blocks))).requires_grad_(False)
        model.table = nn.Embedding(512, 512)  # no graph multiplies by it
        if blockwise:
            omniq_compile.compile(model, options)
            model(X)
        else:
            torch.compile(model, backend="omniq", options=options)(X)
        found = told()
        assert len(found) == expected
        assert all("a smaller 'num_bf16_fallback_layers'" in text for text in found)


class Hyper(nn.Module):
    """Its weight depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.matrix * x.mean())


def test_weights_that_each_call_computes_are_said_to_keep_all(told: Any) -> None:
    model = Chain(Hyper(), Hyper(), Block(100))
    whole(model, min_features=65)
    (text,) = told()
    assert text.startswith(
        "nothing in Chain is quantized: its layers are kept (2 x its weight is computed in the "
        "graph (option 'matmul'"
    )
    assert text.endswith(
        "To quantize some, give a smaller 'min_features' or 'matmul': True, which quantizes in "
        "each call what is computed in it"
    )
    model(torch.randn(9, 64))
    assert told() == []

    torch._dynamo.reset()
    whole(Chain(Hyper(), Block(256)), min_features=64)
    assert told() == []
    whole(Chain(Hyper(), Hyper()), min_features=1, matmul=True)
    assert told() == []


def test_a_weight_that_another_graph_multiplies_by_is_not_taken_for_one_of_them(told: Any) -> None:
    whole(Chain(Hyper(), WideBlock(), breaks=(1,)), min_features=64)
    assert told() == []


def test_a_weight_that_is_no_parameter_is_said_to_keep_all(told: Any) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = torch.randn(300, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.matrix)

    whole(Plain())
    (text,) = told()
    assert "1 x its weight is an input, no parameter or buffer" in text


def test_activations_that_meet_are_no_layers(told: Any) -> None:
    whole(Holder(lambda x: x @ x.T))
    assert told() == []


def test_an_adapter_whose_scale_became_a_symbol_is_said_to_keep_all(told: Any) -> None:
    """PyTorch compiles for a number, and once it has changed for any: an input of the graph."""

    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(300, 64))
            self.down, self.up = (nn.Parameter(torch.randn(n, m)) for n, m in ((4, 64), (300, 4)))
            self.scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            merged = self.matrix + self.up @ self.down * self.scale
            return torch.nn.functional.linear(x, merged)

    model = Merged().requires_grad_(False)
    fast = torch.compile(model, backend="omniq", options=OPTIONS | {"min_features": 1})
    fast(X)
    assert told() == []
    model.scale = 0.5
    fast(X)
    (text,) = told()
    assert text.startswith("nothing in Merged is quantized")
    assert "1 x its weight is computed in the graph" in text
