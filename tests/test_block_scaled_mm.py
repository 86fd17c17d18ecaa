"""Block-wise fp8 through cuBLASLt: what it is called with, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import error

from omniq_compile.lowering import reference
from omniq_compile.lowering.cuda import block_scaled_mm
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import get_scheme

BF16 = torch.bfloat16
SCHEME = get_scheme("fp8", 0, (128, 128))
K, N = 1024, 384


def as_recorded(
    a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, **more: Any
) -> torch.Tensor:
    """Stand in for the operator: its checks of scales, and its product in float64.

    What it asks: aten/src/ATen/native/cuda/ScaledBlas.cpp, ``is_blockwise_1x128_scaling`` of a and
    ``is_blockwise_128x128_scaling`` of b transposed, whose rows are padded to four scales.
    """
    assert more == {"out_dtype": BF16}
    (M, K), N = a.shape, b.shape[1]
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert (a_scale.shape, a_scale.stride()) == ((M, K // 128), (1, M))
    assert (b_scale.t().shape, b_scale.t().stride()) == ((N // 128, K // 128), (K // 128, 1))
    assert K // 128 % 4 == 0
    assert a_scale.dtype is b_scale.dtype is torch.float32
    rows = a.double() * a_scale.double().repeat_interleave(128, 1)
    columns = b.double() * b_scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (rows @ columns).to(BF16)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(132,), (2, 66)])
def test_the_operator_gets_scales_as_it_reads_them(
    rows: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", as_recorded)
    x, added = torch.randn(*rows, K).to(BF16), torch.randn(N).to(BF16) if bias else None
    x[..., 0, :] = 0
    weight = get_format(SCHEME.weight).quantize(torch.randn(N, K))
    kernel = block_scaled_mm.BLOCK_SCALED_MM
    problem = Problem(132, K, N, len(rows) + 1, 2, BF16)
    assert kernel.refuse(problem, SCHEME) is None
    a = kernel.quantize(x, SCHEME.activation)
    out = kernel.gemm(a, weight, added, problem, SCHEME)
    formats = SCHEME.activation, SCHEME.weight
    assert (out.shape, out.dtype) == ((*rows, N), BF16)
    # Rounded once, and again with the bias.
    assert error(out, reference.gemm(a, weight, added, *formats, torch.float64)) < 3e-3


def test_scales_of_other_strides_are_laid_out_for_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", as_recorded)
    a, b = (torch.randn(rows, K).to(torch.float8_e4m3fn) for rows in (132, N))
    a_scale, b_scale = torch.rand(132, K // 128).t(), torch.rand(K // 128, N // 128).t()
    out = block_scaled_mm.block_scaled_mm(a, a_scale, b, b_scale)
    laid_out = (a, a_scale.contiguous(), b, b_scale.contiguous())
    assert torch.equal(out, block_scaled_mm.block_scaled_mm(*laid_out))


def test_a_bias_in_float32_is_not_rounded_before_it_is_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product = torch.full((132, N), -1.0, dtype=BF16)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *operands, **options: product)
    kernel, problem = block_scaled_mm.BLOCK_SCALED_MM, Problem(132, K, N, 2, 2, BF16)
    a = kernel.quantize(torch.randn(132, K).to(BF16), SCHEME.activation)
    weight = get_format(SCHEME.weight).quantize(torch.randn(N, K))
    out = kernel.gemm(a, weight, torch.full((N,), 1 + 2.0**-12), problem, SCHEME)
    assert out.eq(2.0**-12).all()


@pytest.mark.parametrize(
    ("scheme", "changed", "said"),
    [
        (get_scheme("fp8"), {}, "this is"),
        (get_scheme("fp8", 0, (64, 128)), {}, "scales per 1 x 128 and 128 x 128"),
        (SCHEME, {"b_rank": 3}, "it takes one weight"),
        (SCHEME, {"b_is_weight": False}, "both operands are activations"),
        (SCHEME, {"M": 130}, "M = 130 is not a multiple of 4"),
        (SCHEME, {"M": "s0"}, "M = s0 is not"),
        (SCHEME, {"N": 192}, "N = 192 is not a multiple of 128"),
        (SCHEME, {"K": 1152}, "K = 1152 is not a multiple of 512"),
        (SCHEME, {"dtype": torch.float16}, "the result is float16"),
    ],
)
def test_what_it_cannot_take_is_refused(scheme: Any, changed: dict[str, Any], said: str) -> None:
    sizes = {"M": 132, "K": K, "N": N, "a_rank": 2, "b_rank": 2, "dtype": BF16} | changed
    assert said in str(block_scaled_mm.refuse(Problem(**sizes), scheme))


def test_an_old_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Problem(132, K, N, 2, 2, BF16)
    for version, refused in {"12.8": True, "12.9": False, "13.0": False}.items():
        monkeypatch.setattr(torch.version, "cuda", version)
        assert (block_scaled_mm.refuse(good, SCHEME) is not None) == refused
