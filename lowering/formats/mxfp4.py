"""mxfp4: OCP MX v1.0 with e2m1 elements, section 5.3.3: two a byte, an e8m0 scale per 32 along K.

With ``scale_alg`` 0 (OCP) the shared exponent is ``floor(log2(amax)) - 2``, so amax / scale is in
[4, 8), and elements above 6 saturate. With 2 (UOS) it is in (3.625, 7.25]: see `mx.block_scale`.
NaN, Inf and all-zero blocks: see `mx`.
"""

from __future__ import annotations

from functools import partial

import torch

from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.formats import mx
from omniq_compile.lowering.formats.float_codes import (
    decode_e2m1,
    e2m1_pairs,
    encode_e2m1,
    join_bfloat16,
    pack_e2m1,
    unpack_e2m1,
)
from omniq_compile.lowering.formats.format import Format, Parts

SUFFIXES = {mx.OCP: "", mx.UOS: "_uos"}


def name_suffix(scale_alg: int) -> str:
    """Return what a ``scale_alg`` adds to a format's name.

    Raises:
        OptionError: neither 0 nor 2.
    """
    if scale_alg not in SUFFIXES:
        raise OptionError(f"unknown mxfp4 scale_alg {scale_alg!r}. Valid: 0 (OCP), 2 (UOS).")
    return SUFFIXES[scale_alg]


def quantize(x: torch.Tensor, scale_alg: int = mx.OCP) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize blocks of 32.

    Args:
        x: ``[..., K]``, any float dtype.
        scale_alg: `mx.OCP` or `mx.UOS`.

    Returns:
        codes uint8 ``[..., K' / 2]``, even k in the low nibble, and e8m0 scale uint8
        ``[..., K' / 32]``, where K' is K padded to whole blocks.
    """
    block = mx.blocks(x)
    amax = torch.maximum(*(mx.block_amax(half) for half in _halves(block)))
    return quantize_blocks(block, amax, scale_alg, x.dtype)


def quantize_blocks(
    block: torch.Tensor,
    amax: torch.Tensor,
    scale_alg: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `quantize` does to blocks, float32 ``[..., n, 32]``, and their amax.

    ``dtype`` is that of the values, see `mx.block_scale`.
    """
    even, odd = _halves(block)
    byte = mx.block_scale(amax, mx.E2M1, scale_alg, dtype)
    codes = pack_e2m1(*(encode_e2m1(mx.scale_down(x, byte)) for x in (even, odd)))
    return codes.flatten(-2), byte.squeeze(-1).to(torch.uint8)


def _halves(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the elements of even and of odd k.

    Taken apart from the start, codes are packed by Inductor in the loop that makes them; it would
    store a byte for each otherwise.
    """
    even, odd = block.unflatten(-1, (mx.BLOCK // 2, 2)).unbind(-1)
    return even, odd


def allocate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantize` returns, without values."""
    *rows, K = x.shape
    codes = x.new_empty((*rows, mx.padded(K) // 2), dtype=torch.uint8)
    return codes, x.new_empty((*rows, mx.padded(K) // mx.BLOCK), dtype=torch.uint8)


def dequantize(parts: Parts) -> torch.Tensor:
    """Return float32 ``[..., K']``."""
    codes, scale = parts
    return mx.dequantize(decode_e2m1(unpack_e2m1(codes)), scale)


def dequantize_bfloat16(parts: Parts) -> torch.Tensor:
    """Return bfloat16 ``[..., K']``, exact, and several times as fast on CPU as `dequantize`."""
    codes, scale = parts
    even, odd = e2m1_pairs(codes)
    return join_bfloat16(mx.dequantize(even, scale), mx.dequantize(odd, scale))


def fake_quantize(x: torch.Tensor, scale_alg: int = mx.OCP) -> torch.Tensor:
    """Return ``dequantize(quantize(x))`` without making codes: float32 ``[..., K']``."""
    return mx.fake_quantize(x, mx.E2M1, scale_alg)


def nbytes(N: int, K: int) -> int:
    """Return the bytes of codes and scales for ``[N, K]``."""
    return N * mx.padded(K) // 2 + N * mx.padded(K) // mx.BLOCK


def scale_format(scale_alg: int) -> Format:
    """Make ``mxfp4`` (``scale_alg`` 0) or ``mxfp4_uos`` (2).

    Raises:
        OptionError: neither 0 nor 2.
    """
    return Format(
        name="mxfp4" + name_suffix(scale_alg),
        parts=("codes", "scale"),
        nbytes=nbytes,
        quantize=partial(quantize, scale_alg=scale_alg),
        allocate=allocate,
        dequantize=dequantize,
        padded=mx.padded,
    )


FORMAT = scale_format(mx.OCP)
UOS_FORMAT = scale_format(mx.UOS)
