"""Quantizes activations on GPUs, to the same parts as everywhere."""

from __future__ import annotations

import torch

from omniq_compile.lowering.formats import fp8, get_format, int8
from omniq_compile.lowering.formats.format import Parts

_BY_ROW = {"int8": int8.quantize, "fp8": fp8.quantize}


def quantize(x: torch.Tensor, format: str) -> Parts:
    """Return the format's parts of ``x [..., K]``.

    The amax of a row is taken of x as it is. Of one in float32 Inductor makes two reads, of which
    the second, where a row is longer than a kernel holds, is from a float32 copy that it stores.
    On CPUs, where each element is converted first, that is faster.
    """
    if format in _BY_ROW:
        return _BY_ROW[format](x, x.abs().amax(dim=-1))
    return get_format(format).quantize(x)
