"""The reference GEMM of any two formats: slow and exact; every kernel is checked against it."""

from __future__ import annotations

import torch

from omniq_compile.lowering.formats import get_format, int8
from omniq_compile.lowering.formats.format import Parts


def gemm(
    a: Parts,
    b: Parts,
    bias: torch.Tensor | None,
    a_format: str,
    b_format: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply quantized operands in float64, add the bias and round once to ``dtype``.

    a is ``[..., M, K]``, b is ``[N, K]`` or ``[..., N, K]``, bias ``[N]``; returns ``[..., M, N]``.
    """
    if a_format == b_format == int8.FORMAT.name:
        return int8.gemm(a, b, bias, dtype)
    left = get_format(a_format).dequantize(a).to(torch.float64)
    right = get_format(b_format).dequantize(b).to(torch.float64)
    # Formats with blocks pad K with zeros, each to its own block.
    K = min(left.shape[-1], right.shape[-1])
    out = left[..., :K] @ right[..., :K].transpose(-1, -2)
    if bias is not None:
        out = out + bias
    return out.to(dtype)
