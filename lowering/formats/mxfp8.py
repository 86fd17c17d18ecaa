"""mxfp8: OCP MX v1.0 with e4m3 elements, section 5.3.1: a byte each, an e8m0 scale per 32 along K.

The shared exponent is ``floor(log2(amax)) - 8``, so amax / scale is in [256, 512): elements above
448 saturate. NaN, Inf and all-zero blocks: see `mx`.
"""

from __future__ import annotations

import torch

from omniq_compile.lowering.formats import mx
from omniq_compile.lowering.formats.float_codes import (
    decode_e4m3,
    e4m3_pairs,
    encode_e4m3,
    join_bfloat16,
)
from omniq_compile.lowering.formats.format import Format, Parts


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize blocks of 32.

    Args:
        x: ``[..., K]``, any float dtype.

    Returns:
        codes float8_e4m3fn ``[..., K']``, and e8m0 scale uint8 ``[..., K' / 32]``, where K' is K
        padded to whole blocks.
    """
    block = mx.blocks(x)
    values, byte = mx.scaled(block, mx.block_amax(block), mx.E4M3, dtype=x.dtype)
    return encode_e4m3(values).flatten(-2), byte.squeeze(-1).to(torch.uint8)


def allocate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantize` returns, without values."""
    *rows, K = x.shape
    codes = x.new_empty((*rows, mx.padded(K)), dtype=torch.float8_e4m3fn)
    return codes, x.new_empty((*rows, mx.padded(K) // mx.BLOCK), dtype=torch.uint8)


def dequantize(parts: Parts) -> torch.Tensor:
    """Return float32 ``[..., K']``."""
    codes, scale = parts
    return mx.dequantize(decode_e4m3(codes), scale)


def dequantize_bfloat16(parts: Parts) -> torch.Tensor:
    """Return bfloat16 ``[..., K']``, faster to make on CPU than float32.

    Exact, save values that are float32 denormals.
    """
    codes, scale = parts
    even, odd = e4m3_pairs(codes)
    return join_bfloat16(mx.dequantize(even, scale), mx.dequantize(odd, scale))


def fake_quantize(x: torch.Tensor) -> torch.Tensor:
    """Return ``dequantize(quantize(x))`` without making codes: float32 ``[..., K']``."""
    return mx.fake_quantize(x, mx.E4M3)


FORMAT = Format(
    name="mxfp8",
    parts=("codes", "scale"),
    nbytes=lambda N, K: N * mx.padded(K) + N * mx.padded(K) // mx.BLOCK,
    quantize=quantize,
    allocate=allocate,
    dequantize=dequantize,
    padded=mx.padded,
)
