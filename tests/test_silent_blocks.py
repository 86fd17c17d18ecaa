"""`omniq_compile.compile` of blocks that no one calls: it compiles what is called, or says so."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import error
from torch import nn
from torch._dynamo.utils import counters

import omniq_compile
from omniq_compile import QuantConfig, explain, quantize_
from omniq_compile.compiling.block_parts import compiled_parts
from omniq_compile.model_blocks import module_blocks

OPTIONS = {"method": "int8", "min_features": 1, "compiler": "eager"}
X = torch.randn(5, 64)


@pytest.fixture(autouse=True)
def _count() -> None:
    counters.clear()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what was warned of since the last question."""

    def ask() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == "omniq" and r.levelno >= 30]
        caplog.clear()
        return found

    return ask


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class FeedForward(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 130), nn.GELU(), nn.Linear(130, 64))


class Projection(nn.Linear):
    pass


CALLED = (Attention, FeedForward, Projection)


def as_attributes(attention: nn.Module, feed_forward: nn.Module) -> nn.Module:
    block = nn.Module()
    block.attention, block.feed_forward = attention, feed_forward
    return block


# name: of attention and feed-forward, what holds them, as lucidrains, x-transformers and CompVis do
HELD: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "list": lambda *parts: nn.ModuleList([*parts, nn.Dropout()]),
    "dict": lambda a, b: nn.ModuleDict({"attention": a, "feed_forward": b}),
    "attributes": as_attributes,
    "nested": lambda a, b: nn.ModuleList([nn.ModuleList([nn.Identity()]), nn.ModuleList([a, b])]),
}


class Held(nn.Module):
    """Calls what its blocks hold, the last block first."""

    def __init__(self, hold: Callable[[nn.Module, nn.Module], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(hold(Attention(), FeedForward()) for _ in range(depth))
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self.layers):
            for part in layer.modules():
                x = part(x) if isinstance(part, CALLED) else x
        return x


@pytest.mark.parametrize("how", HELD)
def test_what_is_called_in_a_block_is_compiled(how: str, told: Any) -> None:
    model = Held(HELD[how])
    exact = model(X)
    omniq_compile.compile(model, OPTIONS)
    out = model(X)
    assert graphs() == 2  # one of each class
    assert 0 < error(out, exact) < 0.02
    assert torch.equal(model(X), out)
    assert graphs() == 2
    assert told() == []


@pytest.mark.parametrize("how", HELD)
def test_blocks_are_counted_and_not_their_parts(how: str, caplog: pytest.LogCaptureFixture) -> None:
    options = OPTIONS | {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1}
    model = Held(HELD[how])
    assert list(module_blocks(model)) == ["layers.0", "layers.1", "layers.2"]
    last = Held(HELD[how], depth=3)
    last.load_state_dict(model.state_dict())
    kept = {row.layer.rpartition(".")[0] for row in quantize_(last, options) if not row.method}
    assert {name[:9] for name in kept} == {"layers.0."}
    assert len(kept) == 2
    parts = [m for m in model.layers[2].modules() if isinstance(m, Attention | FeedForward)]
    x = X
    for part in parts:
        x = part(x)
    ran: list[torch.Tensor] = []
    omniq_compile.compile(model, options)
    with caplog.at_level(logging.INFO, "omniq"):
        parts[1].register_forward_hook(lambda module, args, out: ran.append(out))
        model(X)
    assert torch.equal(ran[0], x)  # the block that runs first is exact, whole
    starts = [r.args[1][:9] for r in caplog.records if "starts at block" in r.msg]
    assert starts == ["layers.2.", "layers.1."]
    assert graphs() == 4


@pytest.mark.parametrize("how", HELD)
def test_a_whole_graph_shows_such_blocks_too(how: str) -> None:
    options = OPTIONS | {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1}
    for model in (Held(HELD[how]), Held(lambda a, b: HELD[how](FeedForward(), b))):
        kept = [s.layer for s in explain(model, X, options).sites if not s.decision.method]
        assert {layer[:9] for layer in kept} == {"layers.2."}  # which runs first
        assert len(kept) == 4
    model = Held(lambda a, b: HELD[how](Projection(64, 64), b))
    kept = [s.layer for s in explain(model, X, options).sites if not s.decision.method]
    assert {layer[:9] for layer in kept} == {"layers.2."}
    assert len(kept) == 3


def test_full_names_are_known_in_what_is_called() -> None:
    model = Held(HELD["list"])
    whole = copy.deepcopy(model)
    options = OPTIONS | {"ignored_layers": ["layers.1.0.qkv", "layers.2.1"]}
    expected = torch.compile(whole, backend="omniq", options=options)(X)
    torch._dynamo.reset()
    counters.clear()
    omniq_compile.compile(model, options)
    assert torch.allclose(model(X), expected, atol=1e-5)
    assert graphs() == 4


def test_a_block_that_can_be_called_is_a_part_itself() -> None:
    """Also one whose `forward` its owner gave it; not one whose `forward` is accelerate's."""
    config = QuantConfig.from_options(OPTIONS)
    model = Held(HELD["list"])
    parts = ["layers.0.0", "layers.0.1"]
    assert list(compiled_parts(module_blocks(model), config)["layers.0"]) == parts
    hooks = pytest.importorskip("accelerate.hooks")
    for layer in model.layers:
        hooks.add_hook_to_module(layer, hooks.ModelHook())
    assert list(compiled_parts(module_blocks(model), config)["layers.0"]) == parts
    for layer in model.layers:
        hooks.remove_hook_from_module(layer)
        layer.forward = lambda x: x
    assert list(compiled_parts(module_blocks(model), config)["layers.0"]) == ["layers.0"]
    with_products = dataclasses.replace(config, matmul=True)
    model = Held(HELD["list"])
    assert [*parts, "layers.0.2"] == [
        *compiled_parts(module_blocks(model), with_products)["layers.0"]
    ]


def test_a_part_of_several_blocks_is_compiled_once(told: Any) -> None:
    model = Held(HELD["list"])
    shared = model.layers[0][0]
    for layer in model.layers:
        layer[0] = shared
    exact, exact_part = model(X), shared(X)
    omniq_compile.compile(model, OPTIONS | {"ignored_layers": ["layers.0"]})
    assert 0 < error(model(X), exact) < 0.02
    assert torch.equal(shared(X), exact_part)  # it is the first block's, which is kept
    assert graphs() == 3
    assert told() == []


def test_blocks_in_which_nothing_can_be_called_are_an_error() -> None:
    lists = nn.ModuleList(nn.ParameterList([torch.zeros(64, 64)]) for _ in range(3))
    model = nn.ModuleList(nn.ModuleList([part]) for part in lists)
    assert list(module_blocks(model)) == ["0", "1", "2"]
    with pytest.raises(omniq_compile.OptionError, match="ModuleList has no repeated blocks"):
        omniq_compile.compile(model, OPTIONS)


class Around(nn.Module):
    """Calls its blocks in some way."""

    def __init__(self, call: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.call = call
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x


def by_forward(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.forward(x)  # type: ignore[no-any-return]


def by_parts(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.out(block.qkv(x)[..., :64])  # type: ignore[no-any-return]


def by_call(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block(x)  # type: ignore[no-any-return]


SILENT = (
    "nothing in Around is compiled: a call of it called none of its 3 blocks, of which the first "
    "is 'blocks.0', but methods or parts of theirs. Compile it whole, in place of "
    'omniq_compile.compile: torch.compile(model, backend="omniq", options=...)'
)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("call", [by_forward, by_parts])
def test_blocks_that_are_not_called_are_said_once(call: Any, stored: bool, told: Any) -> None:
    model = Around(call)
    if stored:
        quantize_(model, OPTIONS)
    exact = model(X)
    omniq_compile.compile(model, OPTIONS)
    assert told() == []
    assert torch.equal(model(X), exact)
    assert told() == [SILENT]
    model(X)
    assert told() == []
    assert graphs() == 0
    assert not model._forward_hooks


def test_blocks_that_are_called_are_not_warned_of(told: Any) -> None:
    model = omniq_compile.compile(Around(by_call), OPTIONS)
    model(X)
    assert graphs() == 1
    assert not model._forward_hooks
    first = Around(by_forward)
    first.call = lambda block, x: block(x) if block is first.blocks[1] else block.forward(x)
    omniq_compile.compile(first, OPTIONS)(X)
    assert graphs() == 2
    config = dataclasses.replace(QuantConfig.from_options(OPTIONS), keep_all="the reference")
    omniq_compile.compile(Around(by_parts), config)(X)
    assert told() == []


def test_compiling_anew_asks_once(told: Any) -> None:
    model = Around(by_forward)
    for method in ("int8", "fp8", "mxfp8"):
        omniq_compile.compile(model, OPTIONS | {"method": method})
    assert len(model._forward_hooks) == 1
    model(X)
    assert told() == [SILENT]
    omniq_compile.compile(model, OPTIONS)(X)
    assert told() == [SILENT]


@pytest.mark.parametrize("call", [by_forward, by_call])
def test_a_trace_is_no_call_and_is_whole(call: Any, told: Any) -> None:
    model = Around(call)
    exact = model(X)
    expected = explain(model, X, OPTIONS)
    omniq_compile.compile(model, OPTIONS)
    counters.clear()
    found = explain(model, X, OPTIONS)
    assert graphs() == 1
    assert not counters["graph_break"]
    assert [s.layer for s in found.sites] == [s.layer for s in expected.sites]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.export.export(model, (X,)).module()(X), exact)
    assert told() == []
    assert len(model._forward_hooks) == 1
    counters.clear()
    assert torch.equal(model(X), exact) == (call is by_forward)
    assert graphs() == (0 if call is by_forward else 1)
    assert told() == ([SILENT] if call is by_forward else [])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_not_waited_for(copied: Any, told: Any) -> None:
    model = Around(by_forward)
    exact = model(X)
    omniq_compile.compile(model, OPTIONS)
    again = copied(model)
    assert torch.equal(again(X), exact)
    assert torch.equal(torch.compile(again, backend="eager", fullgraph=True)(X), exact)
    assert told() == []
    torch._dynamo.reset()
    omniq_compile.compile(copied(model), OPTIONS)(X)
    assert told() == [SILENT]
    model(X)
    assert told() == [SILENT]


class Left(nn.Module):
    """A block whose layers Dynamo leaves to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return left_to_python(self.net, x * 2)


class LeftWhole(Left):
    """All of it."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Product(Left):
    """One that has another product, which no linear holds."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x @ self.matrix)


class Norm(nn.Module):
    """One that multiplies nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def left_to_python(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "count", "options", "why"),
    [
        (LeftWhole, 0, {}, "Dynamo made no graph of them"),
        (Left, 1, {}, "no graph of theirs holds a product"),
        (Left, 1, {"min_features": 65}, None),  # nothing would be quantized anyway
        (Product, 2, {}, None),
        (Norm, 1, {}, None),
    ],
)
def test_blocks_whose_layers_are_in_no_graph_are_said_once(
    kind: type[nn.Module], count: int, options: Any, why: str | None, told: Any
) -> None:
    model = Around(by_call)
    model.blocks = nn.ModuleList(kind() for _ in range(2)).requires_grad_(False)
    omniq_compile.compile(model, OPTIONS | options)
    for _ in range(2):
        model(X)
    assert graphs() == count
    expected = (
        "nothing in Around is quantized: all of its 2 blocks ran, of which the first is 'blocks.0',"
        f" and {why}, so that their layers run as they are. "
        'TORCH_LOGS="dynamo,graph_breaks" shows why'
    )
    assert told() == ([expected] if why else [])


def test_a_block_that_a_call_skips_may_hold_products(told: Any) -> None:
    model = Around(lambda block, x: block(x) if block is model.blocks[0] else x)
    model.blocks = nn.ModuleList(Left() for _ in range(2)).requires_grad_(False)
    omniq_compile.compile(model, OPTIONS)
    model(X)
    assert told() == []
