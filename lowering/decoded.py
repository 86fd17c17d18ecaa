"""Emulated float formats on any device: codes are decoded and multiplied in float32.

Every code is exact in float32, and so is every product of two, so that the result is that of
native hardware up to the order of accumulation. A weight is decoded in each call by a loop that
Inductor generates: what stays in memory are its codes. An activation goes straight to the values
its codes stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from omniq_compile.lowering import float32_matmul  # noqa: F401  (defines the operator)
from omniq_compile.lowering.formats import (
    block_size,
    fp8,
    get_format,
    mx,
    mxfp4,
    mxfp4_dualscale,
    mxfp8,
)
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import Scheme

Values = tuple[torch.Tensor, ...]


class Decoder(NamedTuple):
    """How operands of one format become float32.

    Both functions return values ``[..., K]``, and for a scale per row also that, ``[...]``, which
    the epilogue applies.
    """

    activation: Callable[[torch.Tensor], Values]
    weight: Callable[[Parts], Values]


def _fp8_weight(parts: Parts) -> Values:
    codes, scale = parts
    return fp8.codes_bfloat16(codes).to(torch.float32), scale


def _fp8_block(rows: int, columns: int) -> Decoder:
    """Make that of blocks, and of groups, which are blocks of one row, without e4m3 arithmetic."""

    def applied(values: torch.Tensor, scale: torch.Tensor) -> Values:
        # Of one row any number of rows is left as it is.
        N = 1 if rows == 1 else values.shape[-2]
        return (values * fp8.repeat_scale(scale, rows, columns, N, values.shape[-1]),)

    def activation(x: torch.Tensor) -> Values:
        if rows == 1:
            return applied(*fp8.fake_quantize_group(x, columns))
        return applied(*fp8.fake_quantize_block(x, rows, columns))

    def weight(parts: Parts) -> Values:
        codes, scale = parts
        return applied(fp8.codes_bfloat16(codes).to(torch.float32), scale)

    return Decoder(activation, weight)


def _dualscale(scale_alg: int) -> Callable[[torch.Tensor], Values]:
    def activation(x: torch.Tensor) -> Values:
        return (mxfp4_dualscale.apply_coarse(*mxfp4_dualscale.fake_quantize(x, scale_alg)),)

    return activation


def _dualscale_weight(parts: Parts) -> Values:
    codes, scale, coarse = parts
    values = mxfp4.dequantize_bfloat16((codes, scale)).to(torch.float32)
    return (mxfp4_dualscale.apply_coarse(values, coarse),)


def _mxfp4(scale_alg: int) -> Decoder:
    return Decoder(
        lambda x: (mxfp4.fake_quantize(x, scale_alg),),
        lambda parts: (mxfp4.dequantize_bfloat16(parts).to(torch.float32),),
    )


_DECODERS = {
    "fp8": Decoder(fp8.fake_quantize, _fp8_weight),
    "mxfp8": Decoder(
        lambda x: (mxfp8.fake_quantize(x),),
        lambda parts: (mxfp8.dequantize_bfloat16(parts).to(torch.float32),),
    ),
    "mxfp4": _mxfp4(mx.OCP),
    "mxfp4_uos": _mxfp4(mx.UOS),
    "mxfp4_dualscale": Decoder(_dualscale(mx.OCP), _dualscale_weight),
    "mxfp4_dualscale_uos": Decoder(_dualscale(mx.UOS), _dualscale_weight),
}


def _decoder(name: str) -> Decoder:
    if name in _DECODERS:
        return _DECODERS[name]
    if block := block_size(name):
        return _fp8_block(*block)
    form = get_format(name)
    return Decoder(
        lambda x: (form.dequantize(form.quantize(x)),), lambda parts: (form.dequantize(parts),)
    )


def fake_quantize(x: torch.Tensor, format: str) -> Values:
    """Return the values ``[..., K]`` that an activation's codes stand for, in float32.

    A format with a scale per row returns its codes' values, and the scale ``[...]`` beside them.
    """
    return _decoder(format).activation(x)


def decode_weight(parts: Parts, format: str) -> Values:
    """Return what `gemm` decodes a weight to: float32 ``[N, K]``, and its scale per row if any."""
    return _decoder(format).weight(parts)


def gemm(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Decode a weight, and multiply in float32; see `Kernel.gemm`."""
    if problem.b_is_weight:
        b = decode_weight(b, scheme.weight)
    return gemm_values(a, b, bias, problem.dtype)


def gemm_values(a: Parts, b: Parts, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Multiply decoded operands in float32, each with its scale per row or none.

    a is ``[..., M, K]``, b is ``[N, K]`` or ``[..., N, K]``; returns ``[..., M, N]`` of ``dtype``.
    """
    out = torch.ops.omniq.float32_matmul(a[0], b[0])
    if len(a) > 1:
        out = out * a[1].unsqueeze(-1)
    if len(b) > 1:
        out = out * b[1].unsqueeze(-2)
    if bias is not None:
        out = out + bias
    result: torch.Tensor = out.to(dtype)
    return result


def refuse(problem: Problem, scheme: Scheme) -> str | None:
    """Return why a format cannot be decoded in the graph, or None."""
    if not isinstance(problem.K, int) and scheme.activation != "fp8":
        return f"K is symbolic ({problem.K}), and {scheme.activation} cuts K into blocks"
    return None
