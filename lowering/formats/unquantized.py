"""Activations that stay as they are, beside weights that are quantized alone (W8A16, W4A16)."""

from __future__ import annotations

import torch

from omniq_compile.lowering.formats.format import Format, Parts


def _dequantize(parts: Parts) -> torch.Tensor:
    return parts[0].to(torch.float32)


FORMAT = Format(
    name="unquantized",
    parts=("values",),
    nbytes=lambda N, K: 2 * N * K,
    quantize=lambda x: (x,),
    allocate=lambda x: (torch.empty_like(x, memory_format=torch.contiguous_format),),
    dequantize=_dequantize,
)
