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

# The bits of float32's infinity, above which are NaN's.
_INF = 0x7F800000

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


def block_amax(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the amax of each block: float32 ``[..., n, 32]`` -> ``[..., n, 1]``.

    Args:
        block: see `blocks`.
        dtype: of the values before; see `round_amax`.
    """
    return round_amax(block.abs().amax(dim=-1, keepdim=True), dtype)


def round_amax(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round amax, float32 and not negative, to the dtype that the values had.

    Values of that dtype have such an amax. Those that Inductor computes may not: it leaves out the
    rounding to BF16 between operations that it fuses, and a block's scale jumps at powers of two.
    The cosine of a small angle is 1 in BF16; 0.9999 would get half of the scale, and saturate at
    0.875 (mxfp8) or 0.75 (mxfp4). Integers round here, as a conversion there and back would be
    left out too.
    """
    if dtype not in _DROPPED_BITS:
        return amax
    dropped = _DROPPED_BITS[dtype]
    bits = amax.view(torch.int32)
    to_even = ((1 << dropped - 1) - 1) + ((bits >> dropped) & 1)
    rounded = ((bits + to_even) & -(1 << dropped)).view(torch.float32)
    # The sum overflows for some NaN.
    return torch.where(bits < _INF, rounded, amax)


def block_scale(amax: torch.Tensor, element: Element, scale_alg: int = OCP) -> torch.Tensor:
    """Choose the e8m0 scale of each block.

    ``OCP`` is MX v1.0 section 6.3: ``2**(floor(log2(amax)) - emax)``. It is exact at powers of two,
    because it reads the exponent bits.

    ``UOS`` (e2m1 only) is the smallest power of two s with ``amax / s <= 7.25``: OCP's, doubled
    where amax / s would be in (7.25, 8). This is what Ascend's ``npu_dynamic_mx_quant`` calls
    ``scale_alg=2`` with ``dst_type_max=7.25``: up to 7.25 it costs less to saturate amax at 6 than
    to halve the resolution of the other 31. It never goes above OCP's largest scale, so that no
    finite block decodes to Inf.

    Args:
        amax: float32, not negative, any shape.
        element: whose emax counts.
        scale_alg: ``OCP`` or ``UOS``.

    Returns:
        int32 e8m0 bytes of the same shape, 255 where amax is NaN or Inf.
    """
    bits = amax.view(torch.int32)
    field = (bits >> 23) & 255
    exponent = field
    if scale_alg == UOS:
        exponent = field + ((bits & 0x7FFFFF) > _UOS_MANTISSA).to(torch.int32)
    byte = (exponent - element.emax).clamp(0, 254 - element.emax)
    return torch.where(field == 255, E8M0_NAN, byte)


def scale_down(values: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
    """Divide by ``2**(byte - 127)``, which `block_scale` chose; byte 255 makes NaN."""
    reciprocal = ((254 - byte) << 23).view(torch.float32)
    return values * torch.where(byte == E8M0_NAN, torch.nan, reciprocal)


def scaled(
    block: torch.Tensor, amax: torch.Tensor, element: Element, scale_alg: int = OCP
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the elements are rounded from, and the scale.

    Args:
        block: float32 ``[..., n, 32]``.
        amax: of each, ``[..., n, 1]``.
        element: the element type.
        scale_alg: ``OCP`` or ``UOS``.

    Returns:
        float32 ``[..., n, 32]``, and int32 e8m0 bytes ``[..., n, 1]``.
    """
    byte = block_scale(amax, element, scale_alg)
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
    amax = block_amax(block, x.dtype)
    return fake_quantize_blocks(block, amax, element, scale_alg).flatten(-2)


def fake_quantize_blocks(
    block: torch.Tensor, amax: torch.Tensor, element: Element, scale_alg: int = OCP
) -> torch.Tensor:
    """Do what `fake_quantize` does to blocks and their amax, see `scaled`."""
    values, byte = scaled(block, amax, element, scale_alg)
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
