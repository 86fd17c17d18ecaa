"""int8: symmetric, one float32 scale per row.

``scale = amax / 127`` over a row's K elements, ``code = round_half_even(x / scale)`` in
[-127, 127]. A weight [N, K] has one scale per output row, an activation one per token. There is
no epsilon: an all-zero row has scale 0 and codes 0, and rows of tiny numbers keep their relative
precision. A NaN or Inf makes its own row's scale NaN or Inf, and so only that row's products.
"""

from __future__ import annotations

import torch

from omniq_compile.lowering.formats.format import Format, Parts

CODE_MAX = 127


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row.

    Args:
        x: ``[..., K]``, any float dtype, K >= 1.

    Returns:
        codes int8 ``[..., K]`` and scale float32 ``[...]``.
    """
    real = x.to(torch.float32)
    scale = real.abs().amax(dim=-1) / CODE_MAX
    divisor = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    codes = torch.round(real / divisor).clamp(-CODE_MAX, CODE_MAX).to(torch.int8)
    return codes, scale


def allocate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes int8 ``[..., K]`` and scale float32 ``[...]`` without values."""
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


def dequantize(parts: Parts) -> torch.Tensor:
    """Return ``codes * scale`` in float32, ``[..., K]``."""
    codes, scale = parts
    return codes.to(torch.float32) * scale.unsqueeze(-1)


def epilogue(
    accumulator: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Turn int32 sums into the output: both scales, the bias, one rounding to ``dtype``.

    Args:
        accumulator: int32 ``[..., M, N]``.
        a_scale: float32 ``[..., M]``.
        b_scale: float32 ``[N]``, or ``[..., N]`` where the second operand is batched.
        bias: ``[N]`` of any float dtype, or None.
        dtype: of the result.
    """
    out = accumulator.to(torch.float32) * a_scale.unsqueeze(-1) * b_scale.unsqueeze(-2)
    if bias is not None:
        out = out + bias
    return out.to(dtype)


def gemm(a: Parts, b: Parts, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Multiply exactly in integers (float64 holds them to 2**53), then round as `epilogue` does."""
    accumulator = a[0].to(torch.float64) @ b[0].to(torch.float64).transpose(-1, -2)
    return epilogue(accumulator.to(torch.int32), a[1], b[1], bias, dtype)


FORMAT = Format(
    name="int8",
    parts=("codes", "scale"),
    nbytes=lambda N, K: N * K + 4 * N,
    quantize=quantize,
    allocate=allocate,
    dequantize=dequantize,
)
