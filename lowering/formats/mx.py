"""What the OCP Microscaling formats share: blocks of 32 along K, and their e8m0 scale.

The source is OCP Microscaling Formats (MX) v1.0: sections 5.3 (elements), 5.4.1 (e8m0) and 6.3
(conversion from float32). A ragged K is padded with zeros, which no block scale depends on.

Edges: an all-zero block, and one so small that its exponent falls below e8m0's, has scale byte 0
(2**-127). A NaN or Inf makes its own block's scale NaN (255), and the whole block decodes to NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from omniq_compile.lowering.formats.blocks import pad_last
from omniq_compile.lowering.formats.float_codes import (
    E8M0_NAN,
    round_to_e2m1,
    round_to_e4m3,
    scale_by_e8m0,
)

BLOCK = 32

# How the shared exponent follows from amax.
OCP = 0
UOS = 2

# By how many mantissa bits these are shorter than float32.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}

# The bits of float32's mantissa.
_MANTISSA = 0x7FFFFF

# The mantissa bits of 7.25 = 1.8125 * 2**2.
_UOS_MANTISSA = 0x680000


@dataclass(frozen=True)
class Element:
    """An element type of MX v1.0, section 5.3.

    Attributes:
        emax: exponent of the largest normal value.
        round: float32 -> float32, to the nearest value, half to even, saturated.
    """

    emax: int
    round: Callable[[torch.Tensor], torch.Tensor]


E4M3 = Element(8, round_to_e4m3)
E2M1 = Element(2, round_to_e2m1)


def padded(K: int) -> int:
    """Return K rounded up to whole blocks."""
    return K + -K % BLOCK


def blocks(x: torch.Tensor) -> torch.Tensor:
    """Cut ``x [..., K]`` of any float dtype into blocks: float32 ``[..., ceil(K / 32), 32]``."""
    x = pad_last(x, BLOCK)
    block: torch.Tensor = x.unflatten(-1, (x.shape[-1] // BLOCK, BLOCK))
    return block.to(torch.float32)


def block_amax(block: torch.Tensor) -> torch.Tensor:
    """Return the amax of each block: ``[..., n, 32]`` -> ``[..., n, 1]``."""
    return block.abs().amax(dim=-1, keepdim=True)


def block_scale(
    amax: torch.Tensor,
    element: Element,
    scale_alg: int = OCP,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Choose the e8m0 scale of each block.

    ``OCP`` is MX v1.0 section 6.3: ``2**(floor(log2(amax)) - emax)``. It is exact at powers of two,
    because it reads the exponent bits.

    ``UOS`` (e2m1 only) is the smallest power of two s with ``amax / s <= 7.25``: OCP's, doubled
    where amax / s would be in (7.25, 8). This is what Ascend's ``npu_dynamic_mx_quant`` calls
    ``scale_alg=2`` with ``dst_type_max=7.25``: up to 7.25 it costs less to saturate amax at 6 than
    to halve the resolution of the other 31. It never goes above OCP's largest scale, so that no
    finite block decodes to Inf.

    Values of a shorter dtype have an amax of that dtype. Those that Inductor computes may not: it
    leaves out the rounding to BF16 between operations that it fuses, and a scale jumps at powers of
    two. The cosine of a small angle is 1 in BF16; 0.9999 would get half of the scale, and saturate
    at 0.875 (mxfp8) or 0.75 (mxfp4). So amax counts as what it is in that dtype, a tie as the next
    one up. Half a step is added to its bits: Inductor would leave out a conversion there and back
    too, and computes long expressions in two loops.

    Args:
        amax: float32, not negative, any shape.
        element: whose emax counts.
        scale_alg: ``OCP`` or ``UOS``.
        dtype: that the values had.

    Returns:
        int32 e8m0 bytes of the same shape, 255 where amax is NaN or Inf.
    """
    bits, dropped = amax.view(torch.int32), _DROPPED_BITS.get(dtype, 0)
    if dropped:
        bits = bits + (1 << dropped - 1)
    exponent = bits >> 23
    byte = (exponent - element.emax).clamp_min(0)
    if scale_alg == UOS:
        mantissa = bits & _MANTISSA & -(1 << dropped)
        exponent = exponent + (mantissa > _UOS_MANTISSA).to(torch.int32)
        byte = (exponent - element.emax).clamp(0, 254 - element.emax)
    return torch.where(amax < torch.inf, byte, E8M0_NAN)


def scale_down(values: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
    """Divide by ``2**(byte - 127)``, which `block_scale` chose; byte 255 makes NaN."""
    reciprocal = ((254 - byte) << 23).view(torch.float32)
    return values * torch.where(byte == E8M0_NAN, torch.nan, reciprocal)


def scaled(
    block: torch.Tensor,
    amax: torch.Tensor,
    element: Element,
    scale_alg: int = OCP,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the elements are rounded from, and the scale.

    Args:
        block: float32 ``[..., n, 32]``.
        amax: of each, ``[..., n, 1]``.
        element: the element type.
        scale_alg: ``OCP`` or ``UOS``.
        dtype: that the values had, see `block_scale`.

    Returns:
        float32 ``[..., n, 32]``, and int32 e8m0 bytes ``[..., n, 1]``.
    """
    byte = block_scale(amax, element, scale_alg, dtype)
    return scale_down(block, byte), byte


def fake_quantize(x: torch.Tensor, element: Element, scale_alg: int = OCP) -> torch.Tensor:
    """Quantize and dequantize without making codes, bit for bit the same.

    Args:
        x: ``[..., K]``, any float dtype.
        element: the element type.
        scale_alg: ``OCP`` or ``UOS``.

    Returns:
        float32 ``[..., K']``, K' = K padded to whole blocks. bfloat16 holds every
        value exactly, save float32 denormals.
    """
    block = blocks(x)
    amax = block_amax(block)
    return fake_quantize_blocks(block, amax, element, scale_alg, x.dtype).flatten(-2)


def fake_quantize_blocks(
    block: torch.Tensor,
    amax: torch.Tensor,
    element: Element,
    scale_alg: int = OCP,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Do what `fake_quantize` does to blocks and their amax, see `scaled`."""
    values, byte = scaled(block, amax, element, scale_alg, dtype)
    return scale_by_e8m0(element.round(values), byte)


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Apply scales to decoded elements.

    Args:
        values: float32 ``[..., K']``, or ``[..., K' / 2]`` (every second one).
        scale: uint8 e8m0 ``[..., K' / 32]``.

    Returns:
        float32, the shape of ``values``.
    """
    count = scale.shape[-1]
    split = values.unflatten(-1, (count, values.shape[-1] // max(count, 1)))
    return scale_by_e8m0(split, scale.unsqueeze(-1)).flatten(-2)
