"""Quantizes activations on GPUs, to the same parts as everywhere, and says what is stored."""

from __future__ import annotations

import torch

from omniq_compile.lowering.formats import fp8, get_format, int8
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
    return get_format(format).quantize(x)
