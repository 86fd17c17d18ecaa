"""Quantizes activations on GPUs, to the same parts as everywhere, and says what is stored."""

from __future__ import annotations

import torch

from omniq_compile.lowering import decoded_bfloat16
from omniq_compile.lowering.formats import block_size, fp8, get_format, int8, mx
from omniq_compile.lowering.formats.format import Parts

# Formats that read a row twice, for its amax and for its codes.
BY_ROW = {"int8": int8.quantize, "fp8": fp8.quantize}


def stored(x: torch.Tensor) -> torch.Tensor:
    """Return x, which Inductor then stores: it computes a value again wherever it reads it.

    Inductor cannot look through `torch.as_strided`, whose operand has to be in memory. Checked on
    torch 2.11 to 2.13.
    """
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * size)
    return x.contiguous().as_strided(x.shape, strides)


def quantize(x: torch.Tensor, format: str) -> Parts:
    """Return the format's parts of ``x [..., K]``.

    The amax of a row is taken of x as it is. Of one in float32 Inductor makes two reads, of which
    the second, where a row is longer than a kernel holds, is from a float32 copy that it stores.
    On CPUs, where each element is converted first, that is faster.
    """
    if format in BY_ROW:
        return BY_ROW[format](x, x.abs().amax(dim=-1))
    group = block_size(format)
    if group is None or x.shape[-1] % group[1]:
        return get_format(format).quantize(x)
    # A group is a row of its own. Stored in that shape: Inductor of torch 2.11 and 2.12 makes a
    # second loop of another one, for which it computes x again.
    codes, scale = fp8.quantize(x.unflatten(-1, (-1, group[1])))
    return stored(codes).flatten(-2), scale


_MX = {
    "mxfp8": (mx.E4M3, mx.OCP),
    "mxfp4": (mx.E2M1, mx.OCP),
    "mxfp4_uos": (mx.E2M1, mx.UOS),
}


def quantize_bfloat16(x: torch.Tensor, format: str) -> Parts:
    """Return what `decoded_bfloat16.quantize` does, bit for bit.

    Stored in the shape of blocks, as `quantize` does: between two loops Inductor of torch 2.11 and
    2.12 stores the activation in float32.
    """
    if format not in _MX:
        return decoded_bfloat16.quantize(x, format)
    block = mx.blocks(x)
    values = mx.fake_quantize_blocks(block, mx.block_amax(block), *_MX[format])
    return (stored(values.to(torch.bfloat16)).flatten(-2),)
