"""Inductor's ``freezing`` changes neither the numbers nor the GEMM.

With it on, Inductor rewrites ``_int_mm`` with a constant weight to oneDNN's s8 qlinear, a thousand
times slower (``_register_smooth_quant_int_mm_pattern``, checked on torch 2.13). Codes are inputs of
the graph, never constants, so that this pattern does not match.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import Holder, compiled, dequantized, error
from generated_code import Program, generated
from torch._inductor import freezing

K, H, N = 70, 150, 45

# Rows, with and without a batch: Inductor's pattern comes with and without reshapes.
SHAPES = [(2, 13, K), (13, K)]


@contextmanager
def counted() -> Iterator[mock.Mock]:
    """Count the graphs that Inductor freezes."""
    with mock.patch.object(freezing, "freeze", wraps=freezing.freeze) as freeze:
        yield freeze


def mlp(dtype: torch.dtype) -> Holder:
    def function(x: torch.Tensor, u: Any, c: Any, w: Any, b: Any) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(x, u, c)), w, b)

    shapes = {"u": (H, K), "c": (H,), "w": (N, H), "b": (N,)}
    return Holder(function, **{n: (torch.randn(s) / 8).to(dtype) for n, s in shapes.items()})


def read(function: Any, x: torch.Tensor, frozen: bool) -> tuple[torch.Tensor, Program]:
    with counted() as freeze, torch.inference_mode():
        result = generated(function, x)
    assert freeze.call_count == frozen
    return result


@pytest.mark.parametrize("target", ["cpu:avx512_vnni", "cpu:generic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_freezing_keeps_the_gemm_and_the_numbers(
    dtype: torch.dtype, shape: tuple[int, ...], target: str
) -> None:
    model, x = mlp(dtype), torch.randn(shape).to(dtype)
    options = {"compiler": "inductor", "target": target}
    plain, program = read(compiled(model, **options), x, frozen=False)
    operators = [call.target for call in program.calls if not call.source]
    assert len(operators) == 2

    by_option = read(compiled(model, **options, inductor={"freezing": True}), x, frozen=True)
    with torch._inductor.config.patch(freezing=True):
        everywhere = read(compiled(model, **options), x, frozen=True)
    assert "_frozen_param" in everywhere[1].text
    for result, program in (by_option, everywhere):
        assert "qlinear" not in program.text
        assert [call.target for call in program.calls if not call.source] == operators
        assert torch.equal(result, plain)

    hidden = F.gelu(dequantized(x) @ dequantized(model.u).T + model.c.double()).float()
    expected = dequantized(hidden) @ dequantized(model.w).T + model.b.double()
    assert error(plain, expected) < 2.0**-9


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_constant_weight_would_become_qlinear(shape: tuple[int, ...]) -> None:
    """The near miss: the same arithmetic with its codes as a buffer of the model."""
    model = Holder(
        lambda x, codes, scale: (
            torch._int_mm(x.flatten(0, -2), codes.t()).unflatten(0, x.shape[:-1]).float()
            * torch.ones(*x.shape[:-1], 1) * scale
        ),
        buffers=True, codes=torch.ones(N, K, dtype=torch.int8), scale=torch.rand(N),
    )  # fmt: skip
    x = torch.ones(shape, dtype=torch.int8)
    with torch._inductor.config.patch(freezing=True):
        _, program = read(torch.compile(model), x, frozen=True)
    assert "qlinear" in program.text
