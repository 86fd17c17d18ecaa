"""Quantizes activations on GPUs, to the same parts as everywhere, and says what is stored."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from omniq_compile.lowering import decoded_bfloat16
from omniq_compile.lowering.formats import block_size, get_format, mx
from omniq_compile.lowering.formats.float_codes import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MIN_NORMAL,
    scale_by_e8m0,
)
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.formats.int8 import CODE_MAX
from omniq_compile.lowering.materialized import stored

_BY_ROW = ("int8", "fp8")

# Beside 1.5 * 2**23 a float32 has a step of 1: the addition rounds half to even, and leaves the
# integer in the lowest bits.
_ROUNDING = 1.5 * 2.0**23


def quantize(x: torch.Tensor, format: str) -> Parts:
    """Return the format's parts of ``x [..., K]``.

    Those of rows and of groups of a row differ from the reference's in less than a millionth of a
    step: see `_by_row`.
    """
    if format in _BY_ROW:
        return _by_row(x, format)
    group = block_size(format)
    if group is None or x.shape[-1] % group[1]:
        return get_format(format).quantize(x)
    # A group is a row of its own. Stored in that shape: Inductor of torch 2.11 and 2.12 makes a
    # second loop of another one, for which it computes x again.
    codes, scale = _by_row(x.unflatten(-1, (-1, group[1])), "fp8")
    return stored(codes).flatten(-2), scale


def _by_row(x: torch.Tensor, format: str) -> Parts:
    """Return codes ``[..., K]`` of int8 or fp8, and scale float32 ``[...]``.

    Of what a GPU does for each element, reading and writing is the smaller part, so this takes a
    third of the instructions that the reference's arithmetic does. amax is one of integers, since
    float32 bits are ordered as the numbers are, NaN above all others; of floating-point numbers
    NaN would have to be asked for. A row is multiplied by its scale's reciprocal. Nothing is
    saturated, as no finite quotient reaches the next code. A scale below the smallest normal
    float32 (amax 5.3e-36 for fp8, 1.5e-36 for int8) counts as zero.
    """
    code_max = CODE_MAX if format == "int8" else E4M3_MAX
    # Not of `real`, of which Inductor makes two reads, the second, where a row is longer than a
    # kernel holds, from a float32 copy that it stores.
    bits = _bits(x.abs().to(torch.float32)).amax(dim=-1)
    scale = bits.view(torch.float32) / code_max
    factor = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, 1 / scale)
    scaled = x.to(torch.float32) * factor.unsqueeze(-1)
    if format == "int8":
        return _bits(scaled + _ROUNDING).to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn), scale


@dataclass(frozen=True)
class _Rounding:
    """How blocks of an MX format are rounded.

    ``maximum`` and ``normal`` are the float32 bits of the element's largest value and of its
    smallest normal one, and beside ``beside`` times a power of two a float32 has the step that the
    element has at that power.
    """

    element: mx.Element
    scale_alg: int
    maximum: int
    normal: int
    beside: float


def _bits_of(number: float) -> int:
    return int.from_bytes(struct.pack("<f", number), "little")


_E4M3 = (_bits_of(E4M3_MAX), _bits_of(E4M3_MIN_NORMAL), 1.5 * 2.0**20)
_E2M1 = (_bits_of(E2M1_MAX), _bits_of(1.0), 1.5 * 2.0**22)


_MX = {
    "mxfp8": _Rounding(mx.E4M3, mx.OCP, *_E4M3),
    "mxfp4": _Rounding(mx.E2M1, mx.OCP, *_E2M1),
    "mxfp4_uos": _Rounding(mx.E2M1, mx.UOS, *_E2M1),
}


def quantize_bfloat16(x: torch.Tensor, format: str) -> Parts:
    """Return what `decoded_bfloat16.fake_quantize` does, bit for bit.

    Stored in the shape of blocks, as `quantize` does: between two loops Inductor of torch 2.11 and
    2.12 stores the activation in float32.
    """
    if format not in _MX:
        return decoded_bfloat16.fake_quantize(x, format)
    values = _fake_quantize_blocks(mx.blocks(x), x.dtype, _MX[format])
    return (stored(values.to(torch.bfloat16)).flatten(-2),)


def _fake_quantize_blocks(
    block: torch.Tensor, dtype: torch.dtype, rounding: _Rounding
) -> torch.Tensor:
    """Do what `mx.fake_quantize` does to float32 ``[..., n, 32]``, in half of the instructions.

    It compares magnitudes as integers, see `_by_row`, and leaves the sign until the end. A NaN
    becomes a number on the way, and NaN again by its block's scale.
    """
    magnitude = block.abs()
    amax = _bits(magnitude).amax(dim=-1, keepdim=True).view(torch.float32)
    byte = mx.block_scale(amax, rounding.element, rounding.scale_alg, dtype)
    saturated = _bits(mx.scale_down(magnitude, byte)).clamp_max(rounding.maximum)
    binade = (saturated & 0x7F800000).clamp_min(rounding.normal).view(torch.float32)
    rounder = binade * rounding.beside
    rounded = (saturated.view(torch.float32) + rounder) - rounder
    sign = _bits(block) & -(2**31)
    return (_bits(scale_by_e8m0(rounded, byte)) | sign).view(torch.float32)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)
