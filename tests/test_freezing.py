"""Inductor's ``freezing`` changes neither the GEMM nor the numbers.

With it on, Inductor before torch 2.14 rewrites ``_int_mm`` by a constant weight to oneDNN's s8
qlinear, which is a thousand times slower (``_register_smooth_quant_int_mm_pattern``). Here the
product is an operator of omniq's own, which that pattern does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import Holder, compiled, dequantized, error
from generated_code import Program, generated
from torch._inductor import freezing

from omniq_compile import QuantizedTensor, explain, quantize
from omniq_compile.lowering import int8_gemms
from omniq_compile.lowering.formats import int8
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import get_scheme

M, K, H, N = 13, 70, 150, 45

# The pattern has forms with reshapes and without, with a bias and without: so has the model.
by_shape = pytest.mark.parametrize("shape", [(2, M, K), (M, K)], ids=str)


def mlp(x: torch.Tensor, u: torch.Tensor, c: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, u, c)), w)


def read(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, frozen: bool
) -> tuple[torch.Tensor, Program]:
    """Compile and call a function, and check whether Inductor froze its graph.

    It does so without gradients alone, and says nothing otherwise.
    """
    with (
        mock.patch.object(freezing, "freeze", wraps=freezing.freeze) as freeze,
        torch.inference_mode(),
    ):
        result, program = generated(function, x)
    assert freeze.call_count == frozen
    return result, program


def operators(program: Program) -> list[str]:
    return [call.target for call in program.calls if not call.source]


@pytest.mark.parametrize("target", ["cpu:avx512_vnni", "cpu:generic"])
@by_shape
def test_freezing_keeps_the_gemm_and_the_numbers(shape: tuple[int, ...], target: str) -> None:
    sizes = {"u": (H, K), "c": (H,), "w": (N, H)}
    tensors = {n: (torch.randn(size) / 8).to(torch.bfloat16) for n, size in sizes.items()}
    model, x = Holder(mlp, **tensors), torch.randn(shape, dtype=torch.bfloat16)
    options = {"compiler": "inductor", "target": target}
    plain, program = read(compiled(model, **options), x, frozen=False)
    gemms = operators(program)
    assert len(gemms) == 2

    by_option = read(compiled(model, **options, inductor={"freezing": True}), x, frozen=True)
    with torch._inductor.config.patch(freezing=True):
        everywhere = read(compiled(model, **options), x, frozen=True)
    for result, frozen in (by_option, everywhere):
        assert "qlinear" not in frozen.text
        assert operators(frozen) == gemms
        assert torch.equal(result, plain)
    # Dynamo makes parameters constants only when all of Inductor is told to freeze.
    assert "_frozen_param" in everywhere[1].text

    hidden = F.gelu(dequantized(x) @ dequantized(model.u).T + model.c.double()).float()
    assert error(plain, dequantized(hidden) @ dequantized(model.w).T) < 2.0**-9


def test_stored_codes_do_not_become_constants_either() -> None:
    """A model quantized in place has codes for parameters, which Dynamo makes constants."""
    model = Holder(mlp, u=torch.randn(H, K), c=torch.randn(H), w=torch.randn(N, H) / 8)
    for name in "uw":
        stored = quantize(getattr(model, name), "int8")
        setattr(model, name, torch.nn.Parameter(stored, requires_grad=False))
        assert isinstance(getattr(model, name), QuantizedTensor)
    x, options = torch.randn(M, K), {"compiler": "inductor", "target": "cpu:avx512_vnni"}
    plain, _ = read(compiled(model, **options), x, frozen=False)
    with torch._inductor.config.patch(freezing=True):
        result, program = read(compiled(model, **options), x, frozen=True)
    assert operators(program) == ["torch.ops.omniq.int8_matmul.default"] * 2
    assert torch.equal(result, plain)


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="Inductor has the pattern no more")
def test_the_same_arithmetic_by_a_constant_would_become_qlinear() -> None:
    """The near miss: the plain integer GEMM, with its codes as a buffer of the model."""
    problem = Problem(M, K, N, a_rank=2, b_rank=2, dtype=torch.bfloat16)

    def function(x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        codes = int8_gemms.quantize(x, "int8")
        return int8_gemms.gemm_int_mm(codes, weight, None, problem, get_scheme("int8"))

    codes, scale = int8.quantize(torch.randn(N, K))
    model = Holder(function, buffers=True, codes=codes, scale=scale)
    with torch._inductor.config.patch(freezing=True):
        _, program = read(torch.compile(model), torch.randn(M, K).to(torch.bfloat16), frozen=True)
    assert "qlinear" in program.text
    assert "_int_mm" not in " ".join(operators(program))


def test_layers_have_the_same_names_where_dynamo_makes_weights_constants() -> None:
    model = torch.nn.Sequential(
        Holder(mlp, u=torch.randn(H, K), c=torch.randn(H), w=torch.randn(N, H))
    )
    options = {"method": "int8", "min_features": 1, "ignored_layers": ["0.w"]}
    with torch._inductor.config.patch(freezing=True):
        report = explain(model, torch.randn(M, K), options)
    assert [site.layer for site in report.rewritten] == ["0.u"]
    assert [site.layer for site in report.kept] == ["0.w"]
