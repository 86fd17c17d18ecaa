"""A layer is no block, though an adapter makes it hold others: all that counts blocks agrees."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import traced
from torch import nn
from torch._dynamo.utils import counters

import omniq_compile
from omniq_compile import explain, quantize_
from omniq_compile.model_blocks import module_blocks
from omniq_compile.passes.printing.sections import split
from omniq_compile.passes.regions import Link, find_blocks, with_containers

LEADING = 4
OPTIONS = {
    "method": "mxfp4_dualscale",
    "min_features": 1,
    "compiler": "eager",
    "num_bf16_fallback_layers": LEADING,
}
X = torch.randn(5, 64)
Layer = Callable[[int, int], nn.Module]


class Block(nn.Module):
    def __init__(self, layer: Layer = nn.Linear) -> None:
        super().__init__()
        self.q, self.o = layer(64, 64), layer(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o(self.q(x))


class OtherBlock(Block):
    pass


class Net(nn.Module):
    """Embeddings of text and time as Wan has them, and blocks."""

    def __init__(self, layer: Layer = nn.Linear, inside: Layer | None = None) -> None:
        super().__init__()
        self.text = nn.Sequential(layer(64, 64), nn.GELU(), layer(64, 64))
        self.time = nn.Sequential(layer(64, 64), nn.SiLU(), layer(64, 64))
        self.blocks = nn.ModuleList([Block(inside or layer) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.time(self.text(x))
        for block in self.blocks:
            x = block(x)
        return x


class LinearLora(nn.Linear):
    """A linear with its adapter in it, as black-forest-labs' flux has it."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.lora_A, self.lora_B = nn.Linear(rows, 4), nn.Linear(4, columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x))


class AroundLinear(nn.Module):
    """A module around a linear, and the adapter beside it."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.linear = nn.Linear(rows, columns)
        self.lora_down, self.lora_up = nn.Linear(rows, 4), nn.Linear(4, columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.lora_up(self.lora_down(x))


class ByParameters(nn.Module):
    """A layer of the model's own, whose adapter is two parameters."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, rows) / 8)
        self.lora_A = nn.Parameter(torch.randn(4, rows) / 8)
        self.lora_B = nn.Parameter(torch.randn(columns, 4) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + x @ self.lora_A.T @ self.lora_B.T


def by_peft(**config: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = {"r": 4, "target_modules": "all-linear", **config}
    model = peft.inject_adapter_in_model(peft.LoraConfig(**config), Net())
    assert isinstance(model, nn.Module)
    return model


NETS: dict[str, Callable[[], nn.Module]] = {
    "no adapter": Net,
    "a subclass": lambda: Net(LinearLora),
    "a module around": lambda: Net(AroundLinear),
    "parameters": lambda: Net(ByParameters, nn.Linear),
    "in the embeddings alone": lambda: Net(LinearLora, nn.Linear),
    "in the blocks alone": lambda: Net(nn.Linear, AroundLinear),
    "peft": by_peft,
    "peft, in the embeddings alone": lambda: by_peft(
        target_modules=["text.0", "text.2", "time.0", "time.2"]
    ),
    "peft, in the blocks alone": lambda: by_peft(target_modules=["q", "o"]),
}


def first_two(layer: str) -> str:
    return ".".join(layer.split(".")[:2])


@pytest.mark.parametrize("name", NETS)
def test_adapters_do_not_change_which_blocks_come_first(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = NETS[name]().eval().requires_grad_(False)
    leading = {f"blocks.{number}" for number in range(LEADING)}
    rest = {"blocks.4", "blocks.5", "text.0", "text.2", "time.0", "time.2"}
    assert list(module_blocks(model)) == [f"blocks.{number}" for number in range(6)]
    sites = explain(model, X, OPTIONS).sites
    assert {first_two(s.layer) for s in sites if s.decision.method is None} == leading
    assert {first_two(s.layer) for s in sites if s.decision.method} == rest
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, "omniq"):
        omniq_compile.compile(model, OPTIONS)(X)
    starts = [r.args for r in caplog.records if "starts at block" in r.msg]
    assert starts == [(1, "blocks.0"), (2, "blocks.4")]
    rows = quantize_(NETS[name](), OPTIONS)
    assert {first_two(row.layer) for row in rows if row.method is None} == leading
    linears = {first_two(place) for place, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {first_two(row.layer) for row in rows if row.method} == rest & linears


def test_a_graph_shows_no_layer_as_a_block_either() -> None:
    for name in ("a subclass", "a module around", "peft"):
        model = NETS[name]().eval().requires_grad_(False)
        ((gm, _),) = traced(model, X)
        found = [section.block for section in split(gm) if section.block]
        assert found == [f"blocks.{number}" for number in range(6)], name
        torch._dynamo.reset()


@pytest.mark.parametrize("kinds", [(Block, OtherBlock), (OtherBlock, Block, Block)])
def test_blocks_of_alternating_classes_are_blocks(kinds: tuple[type[Block], ...]) -> None:
    model = Net()
    model.blocks = nn.ModuleList([kind() for _ in range(2) for kind in kinds])
    model.requires_grad_(False)
    names = [f"blocks.{number}" for number in range(2 * len(kinds))]
    assert list(module_blocks(model)) == names
    options = OPTIONS | {"num_bf16_fallback_layers": 3}
    kept = [s.layer for s in explain(model, X, options).sites if not s.decision.method]
    assert kept == [f"{name}.{layer}" for name in names[:3] for layer in "qo"]
    kept = [row.layer for row in quantize_(model, options) if not row.method]
    assert kept == [f"{name}.{layer}" for name in names[:3] for layer in "qo"]


def chains(*names: str, kind: str = "Some") -> list[tuple[Link, ...]]:
    """The links to each module by its name's parts, the last left out."""
    cut = [name.split(".") for name in names]
    return [tuple(Link(".".join(p[:n]), kind) for n in range(2, len(p))) for p in cut]


def test_a_block_with_an_adapter_beside_several_layers_is_a_block() -> None:
    held = ["attn.to_q", "ff.net", "lora_control.up"]
    names = [f"blocks.{number}.{layer}" for number in range(3) for layer in held]
    assert set(find_blocks(chains(*names)).values()) == {"blocks.0", "blocks.1", "blocks.2"}
    names = [name for name in names if ".ff." not in name]
    assert find_blocks(chains(*names)) == {}


def test_weights_alone_tell_that_a_module_wraps_a_layer() -> None:
    """As where a trace has no call of the adapter's own layers: it is fused, or off."""
    names = [f"text.{number}.some.layer" for number in (0, 2)]
    assert set(find_blocks(chains(*names)).values()) == {"text.0", "text.2"}
    for own in ("base_layer.weight", "lora_A", "lora_A.default.weight"):
        weights = [f"text.{number}.{own}" for number in (0, 2)]
        assert find_blocks(chains(*names), weights) == {}
    weights = [f"text.{number}.{own}" for number in (0, 2) for own in ("my_lora_A", "base_layers")]
    assert set(find_blocks(chains(*names), weights).values()) == {"text.0", "text.2"}


class OwnMatrices(nn.Module):
    """A block that holds no layer: it multiplies by matrices of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(64, 130) / 8)
        self.down = nn.Parameter(torch.randn(130, 64) / 8)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(x @ self.up) @ self.down


class OwnWeight(nn.Module):
    """A linear of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(64, 64) / 8),
            nn.Parameter(torch.zeros(64)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class OwnGain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=-1) * self.gamma * 8


def test_blocks_that_multiply_themselves_are_blocks() -> None:
    model = Net()
    model.blocks = nn.ModuleList(OwnMatrices() for _ in range(6))
    model.requires_grad_(False)
    outside = OPTIONS | {"ignored_layers": ["text", "time"]}
    expected = torch.compile(copy.deepcopy(model), backend="omniq", options=outside)(X)
    assert list(module_blocks(model)) == [f"blocks.{number}" for number in range(6)]
    kept = [s.layer for s in explain(model, X, OPTIONS).sites if not s.decision.method]
    assert kept == [f"blocks.{n}.{matrix}" for n in range(LEADING) for matrix in ("up", "down")]
    torch._dynamo.reset()
    counters.clear()
    omniq_compile.compile(model, OPTIONS)
    assert torch.allclose(model(X), expected, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(64, 64),
        lambda: nn.Embedding(64, 64),
        lambda: nn.GRU(64, 64),
        lambda: nn.ParameterList([torch.zeros(64, 64)]),
        OwnWeight,
        OwnGain,
    ],
)
@pytest.mark.parametrize("container", [nn.ModuleList, lambda layers: nn.Sequential(*layers)])
def test_layers_in_a_container_are_no_blocks(layer: Any, container: Any) -> None:
    model = nn.ModuleDict({"layers": container([layer() for _ in range(3)])})
    assert list(module_blocks(model)) == []
    model["layers"] = container([OwnMatrices() for _ in range(3)])
    assert list(module_blocks(model)) == ["layers.0", "layers.1", "layers.2"]


class Unlike(Block):
    pass


class Stem(Net):
    """Two modules before the blocks that a list holds, of a class each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList([Unlike(), OtherBlock()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.stem:
            x = module(x)
        return super().forward(x)


def test_modules_that_are_called_in_a_list_are_not_of_one_class_for_that() -> None:
    sites = explain(Stem(), X, OPTIONS | {"num_bf16_fallback_layers": 2}).sites
    kept = [site.layer for site in sites if site.decision.method is None]
    assert kept == [f"blocks.{i}.{name}" for i in (0, 1) for name in "qo"]
    called = Link("stem.0", "Block"), Link("stem.0.q.1", "Linear")
    assert with_containers(called) == called
