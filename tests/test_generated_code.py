"""What Inductor makes of the kernels' arithmetic: loops that are fused, and nothing read twice.

These tests read the generated C++ program. The sizes are ragged and all different, so that a
tensor is known by its number of elements.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Holder, compiled, dequantized, error
from generated_code import Program, generated

B, T, K, H, N = 2, 13, 70, 150, 45
M = B * T

# The machine's own target is one of the two that follow; a kernel of either runs on any CPU.
by_target = pytest.mark.parametrize("target", ["cpu", "cpu:avx512_vnni", "cpu:generic"])

GEMMS = ("_int_mm", "int8_matmul", "float32_matmul")

# One rounding to BF16 errs by up to 2**-9 of each value, and by less than half of that on average.
ONE_ROUNDING = 2.0**-9


@torch.library.custom_op("omniq_tests::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@opaque.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def weight(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) / math.sqrt(columns)).to(torch.bfloat16)


def read(model: Holder, *inputs: torch.Tensor, **options: Any) -> tuple[Any, Program]:
    return generated(compiled(model, compiler="inductor", **options), *inputs)


def modulated(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (K,)) * (1 + scale) + shift


# A producer of a linear's input, the inputs it takes, and a function that its C++ has to call.
PRODUCERS = {
    "modulate": (modulated, [(B, T, K), (B, 1, K), (B, 1, K)], "sqrt("),
    "tanh-gelu": (lambda x: F.gelu(x, approximate="tanh"), [(B, T, K)], "tanh("),
    "gelu": (F.gelu, [(B, T, K)], "erf("),
    "silu-gate": (lambda x, y: F.silu(x) * y, [(B, T, K), (B, T, K)], "exp("),
}


@by_target
@pytest.mark.parametrize("name", PRODUCERS)
def test_quantize_is_in_its_producer_s_kernel(name: str, target: str) -> None:
    """Its row maximum, its rounding and its int8 store: no other kernel reads the producer's result.

    GELU and the gate keep a row in a local buffer between the two loops that a row maximum takes.
    Modulate does not: it has loops of its own in the same kernel, with float32 scratch memory.
    """
    produce, shapes, function = PRODUCERS[name]
    model = Holder(lambda *x: F.linear(produce(*x[:-2]), *x[-2:]), w=weight(N, K), b=random(N))
    inputs = [random(*shape) for shape in shapes]
    result, program = read(model, *inputs, target=target)

    first, last = program.kernels
    assert function in first.source
    assert "int8_t" in first.writes.values()
    # All that lies between kernels: scales, sums and codes.
    assert program.between() == [("float", M), ("int32_t", M * N), ("int8_t", M * K)]
    assert program.writing("at::BFloat16") == [last]

    activation = produce(*(x.double() for x in inputs)).float()
    expected = dequantized(activation) @ dequantized(model.w).T + model.b.double()
    assert error(result, expected) < ONE_ROUNDING


def test_behind_an_opaque_operator_quantize_is_a_kernel_of_its_own() -> None:
    """The near miss: what the counts above say when nothing can be fused."""
    model = Holder(lambda x, w: F.linear(opaque(F.gelu(x)), w), w=weight(N, K))
    _, program = read(model, random(B, T, K))
    first, quantize, _ = program.kernels
    assert program.writing("int8_t") == [quantize]
    assert "erf(" in first.source
    assert "erf(" not in quantize.source
    assert program.between().count(("at::BFloat16", M * K)) == 2
