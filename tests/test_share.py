"""One quantize node serves all that multiply the same activation, and no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS, Holder, count, dequantized, error
from torch import fx, nn

from omniq_compile import QuantConfig
from omniq_compile.backend import omniq
from omniq_compile.lowering.target import detect
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Binding, Context
from omniq_compile.passes.rewrite import GEMM, QUANTIZE


@torch.library.custom_op("omniq_tests::double_in_place", mutates_args=("x",))
def double_in_place(x: torch.Tensor) -> None:
    x.mul_(2)


@dataclass(frozen=True)
class Run:
    """One compiled call: its result, and the graph before and after it was lowered."""

    result: Any
    quantized: fx.GraphModule
    lowered: fx.GraphModule
    bindings: list[Binding]

    @property
    def counts(self) -> tuple[int, int]:
        return count(self.quantized, QUANTIZE), count(self.quantized, GEMM)


def run(model: nn.Module, *inputs: torch.Tensor) -> Run:
    context = Context(QuantConfig.from_options(OPTIONS), detect("cpu"), stages={})

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        pipeline.run(gm, context)
        return omniq(gm, example_inputs, options=OPTIONS)

    result = torch.compile(model, backend=backend)(*inputs)
    assert context.stages is not None
    return Run(result, context.stages["quantized"], context.stages["lowered"], context.bindings)


def two(between: Callable[[torch.Tensor], object]) -> Holder:
    def function(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.clone()
        first = F.linear(x, w)
        between(x)
        return first, F.linear(x, v)

    return Holder(function, w=torch.randn(19, 38), v=torch.randn(23, 38))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(38, 19), nn.Linear(38, 19, bias=False)
        self.v, self.out = nn.Linear(38, 23), nn.Linear(23, 38)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def test_q_k_and_v_share_one_quantize_node() -> None:
    model, x = Attention(), torch.randn(2, 7, 38)
    ran = run(model, x)
    assert ran.counts == (2, 4)
    assert len(ran.bindings) == 4
    # Each activation is rounded once after lowering too.
    assert count(ran.lowered, torch.round) == 2

    q, k, v = (
        dequantized(x) @ dequantized(m.weight).T + (0 if m.bias is None else m.bias.double())
        for m in (model.q, model.k, model.v)
    )
    mixed = F.scaled_dot_product_attention(q, k, v).float()
    exact = dequantized(mixed) @ dequantized(model.out.weight).T + model.out.bias.double()
    # Rounding q, k and v to float32 may move a code of `mixed` by one.
    assert error(ran.result, exact) < 1e-3


def test_two_activations_have_a_quantize_node_each() -> None:
    model = Holder(
        lambda x, y, w: (F.linear(x, w), F.linear(y, w), F.linear(x + 0, w)), w=torch.randn(19, 38)
    )
    ran = run(model, torch.randn(7, 38), torch.randn(5, 38))
    assert ran.counts == (3, 3)
    assert len(ran.bindings) == 1


@pytest.mark.parametrize(
    ("shape", "function"),
    [
        ((38, 7), lambda x, w, v: (w @ x, v @ x)),
        ((38,), lambda x, w, v: (F.linear(x, w), F.linear(x, v))),
        (
            (38, 7),
            lambda x, w, v: (torch.einsum("km,nk->mn", x, w), torch.einsum("km,nk->nm", x, v)),
        ),
    ],
    ids=["transpose", "unsqueeze", "permute"],
)
def test_the_steps_before_a_quantize_node_are_shared_too(
    shape: tuple[int, ...], function: Callable[..., object]
) -> None:
    model = Holder(function, w=torch.randn(19, 38), v=torch.randn(23, 38))
    ran = run(model, torch.randn(shape))
    assert ran.counts == (1, 2)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "method": lambda x: x.mul_(2),
    "function": lambda x: torch.relu_(x),
    "operator": lambda x: x.__iadd__(1),
    "xor": lambda x: x.view(torch.int32).__ixor__(1 << 22),
    "set_item": lambda x: x.__setitem__((slice(None), 0), 9.0),
    "through_a_view": lambda x: x[:, 3:9].zero_(),
    "through_data": lambda x: x.data.mul_(2),
    "out": lambda x: torch.mul(x, 2, out=x),
    "out_position": lambda x: F.normalize(x, 2.0, -1, 1e-12, x),
    "in_place_argument": lambda x: F.silu(x, inplace=True),
    "in_place_position": lambda x: F.relu(x, True),
    "foreach": lambda x: torch._foreach_mul_([x], 2.0),
    "overload": lambda x: torch.ops.aten.mul_.Scalar(x, 2.0),
    "overload_packet": lambda x: torch.ops.aten.relu_(x),
    "custom_operator": lambda x: torch.ops.omniq_tests.double_in_place(x),
}


@pytest.mark.parametrize("name", WRITES)
def test_an_activation_written_between_two_linears_is_quantized_twice(name: str) -> None:
    model, x = two(WRITES[name]), torch.randn(7, 38)
    ran = run(model, x)
    assert ran.counts == (2, 2)

    changed = x.clone()
    WRITES[name](changed)
    assert not torch.equal(changed, x)
    first, second = ran.result
    assert error(first, dequantized(x) @ dequantized(model.w).T) < 5e-7
    assert error(second, dequantized(changed) @ dequantized(model.v).T) < 5e-7


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "nothing": lambda x: None,
    "add": lambda x: x + 1,
    "overload": lambda x: torch.ops.aten.add.Tensor(x, x),
    "overload_packet": lambda x: torch.ops.aten.add(x, x),
    "not_in_place": lambda x: F.relu(x, inplace=False),
    "dunder": lambda x: x.__add__(1),
}


@pytest.mark.parametrize("name", READS)
def test_an_activation_only_read_between_two_linears_is_quantized_once(name: str) -> None:
    model, x = two(READS[name]), torch.randn(7, 38)
    ran = run(model, x)
    assert ran.counts == (1, 2)
    _, second = ran.result
    assert error(second, dequantized(x) @ dequantized(model.v).T) < 5e-7


def test_one_layer_used_twice_is_one_weight() -> None:
    layer = nn.Linear(38, 38).requires_grad_(False)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    ran = run(model, torch.randn(7, 38))
    assert ran.counts == (2, 2)
    assert [b.layers for b in ran.bindings] == [("0", "2")]
    names = [n.name for n in ran.quantized.graph.nodes if n.op == "placeholder"]
    assert sum("codes" in name for name in names) == 1


def test_tied_weights_are_one_weight() -> None:
    model = nn.Sequential(nn.Linear(38, 38), nn.Linear(38, 38)).requires_grad_(False)
    model[1].weight = model[0].weight
    x = torch.randn(7, 38)
    ran = run(model, x)
    assert ran.counts == (2, 2)
    assert len(ran.bindings) == 1
    placeholders = [n for n in ran.quantized.graph.nodes if n.op == "placeholder"]
    assert len(placeholders) == 1 + 2 + 2  # x, two biases, codes and scale
    hidden = (dequantized(x) @ dequantized(model[0].weight).T + model[0].bias.double()).float()
    exact = dequantized(hidden) @ dequantized(model[0].weight).T + model[1].bias.double()
    assert error(ran.result, exact) < 1e-3
