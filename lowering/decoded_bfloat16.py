"""Emulated MX formats where BF16 GEMMs are fast: decoded to BF16, and multiplied in it.

An MX element times its power of two is exact in bfloat16 (but for values under 2**-126), a product
of two is exact in the float32 it is summed in, and a linear's bias is added before the one
rounding. So the numbers are those of `decoded`, up to the order of accumulation, and to a float32
bias, which is rounded first; at about twice the speed of a float32 GEMM, and on GPUs far more. The
other formats have float32 scales to apply before that rounding: a GEMM of omniq's own takes what
`fake_quantize_scaled` makes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from omniq_compile.lowering import decoded
from omniq_compile.lowering.formats import (
    block_size,
    fp8,
    mx,
    mxfp4,
    mxfp4_dualscale,
    mxfp8,
    unquantized,
)
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import Scheme

_WEIGHTS: dict[str, Callable[[Parts], torch.Tensor]] = {
    "mxfp8": mxfp8.dequantize_bfloat16,
    "mxfp4": mxfp4.dequantize_bfloat16,
    "mxfp4_uos": mxfp4.dequantize_bfloat16,
}


def fake_quantize(x: torch.Tensor, format: str) -> Parts:
    """Return the values ``[..., K]`` that an activation's codes stand for, in BF16."""
    if format == unquantized.FORMAT.name:
        return (x.to(torch.bfloat16),)
    return (decoded.fake_quantize(x, format)[0].to(torch.bfloat16),)


def fake_quantize_scaled(x: torch.Tensor, format: str) -> Parts:
    """Return an activation's values in BF16, exactly, and its float32 scales where it has any.

    Args:
        x: ``[..., K]``, any float dtype.
        format: any float format.

    Returns:
        bfloat16 ``[..., K']``; beside it for ``fp8`` scale ``[...]``, for ``fp8_group_C``
        ``[..., ceil(K / C)]``, and for the dual scale ``[..., ceil(K / 512)]``.
    """
    if format.startswith("mxfp4_dualscale"):
        scale_alg = mx.UOS if format.endswith(mxfp4.SUFFIXES[mx.UOS]) else mx.OCP
        values, scale = mxfp4_dualscale.fake_quantize(x, scale_alg)
    elif format == "fp8":
        values, scale = fp8.fake_quantize(x)
    elif group := block_size(format):
        values, scale = fp8.fake_quantize_group(x, group[1])
    else:
        return fake_quantize(x, format)
    return values.to(torch.bfloat16), scale


def decode_weight(parts: Parts, format: str) -> Parts:
    """Return what `gemm` decodes a weight to: bfloat16 ``[N, K]``."""
    return (_WEIGHTS[format](parts),)


def gemm(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Decode a weight, and multiply in BF16; see `Kernel.gemm`.

    A bias may be in float32, as autocast leaves it in the graph; autocast would round it too.
    """
    weight = decode_weight(b, scheme.weight)[0] if problem.b_is_weight else b[0]
    if problem.b_rank == 2:
        if bias is not None and bias.dtype != torch.bfloat16:
            bias = bias.to(torch.bfloat16)
        return torch.nn.functional.linear(a[0], weight, bias)
    out = torch.matmul(a[0], weight.transpose(-1, -2))
    return out if bias is None else (out.to(torch.float32) + bias).to(torch.bfloat16)


def refuse(problem: Problem, scheme: Scheme) -> str | None:
    """Return why BF16 cannot hold a problem's operands or its result, or None."""
    if problem.dtype is not torch.bfloat16:
        return f"the result is {str(problem.dtype).removeprefix('torch.')}, not bfloat16"
    return decoded.refuse(problem, scheme)
