"""The operators that a lowered graph calls: one a kernel, each with a fake.

They are custom operators rather than traced launches: the tile depends on M, which a graph may not
know, and tracing needs no Triton. Inductor calls them as they are, in CUDA graphs too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from omniq_compile.lowering.triton_kernels import launch


@torch.library.custom_op("omniq::triton_row_scaled_gemm", mutates_args=())
def row_scaled_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fnuz: bool,
) -> Tensor:
    """Multiply int8 or float8_e4m3fn codes with a scale per row of both.

    Args:
        a: codes ``[..., M, K]``, and a_scale float32 ``[..., M]``.
        b: codes ``[N, K]``, and b_scale float32 ``[N]``.
        bias: ``[N]``, any float dtype, or None.
        dtype: of the result, rounded to once.
        fnuz: multiply e4m3 as e4m3fnuz, which gfx942 has instead.

    Returns:
        ``[..., M, N]`` of ``dtype``.
    """
    operands = {"a": _rows(a, 1), "a_scale": _rows(a_scale, 0), "b": b, "b_scale": b_scale}
    out = _like(a, b, dtype)
    return _multiply(launch.row_scaled, out, **operands, bias=bias, fnuz=fnuz)


@row_scaled_gemm.register_fake
def _(a, a_scale, b, b_scale, bias, dtype, fnuz):  # type: ignore[no-untyped-def]
    return _like(a, b, dtype)


@torch.library.custom_op("omniq::triton_block_scaled_gemm", mutates_args=())
def block_scaled_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    a_columns: int,
    b_rows: int,
    b_columns: int,
    fnuz: bool,
) -> Tensor:
    """Multiply float8_e4m3fn codes with a scale per group of a and per block of b.

    Args:
        a: codes ``[..., M, K]``, and a_scale float32 ``[..., M, ceil(K / a_columns)]``.
        b: codes ``[N, K]``, and b_scale float32 ``[ceil(N / b_rows), ceil(K / b_columns)]``.
        a_columns, b_rows, b_columns: that share a scale.
        bias, dtype, fnuz: as in `row_scaled_gemm`.

    Returns:
        ``[..., M, N]`` of ``dtype``.
    """
    operands = {"a": _rows(a, 1), "a_scale": _rows(a_scale, 1), "b": b, "b_scale": b_scale}
    sizes = {"a_columns": a_columns, "b_rows": b_rows, "b_columns": b_columns}
    out = _like(a, b, dtype)
    return _multiply(launch.block_scaled, out, **operands, **sizes, bias=bias, fnuz=fnuz)


@block_scaled_gemm.register_fake
def _(a, a_scale, b, b_scale, bias, dtype, a_columns, b_rows, b_columns, fnuz):  # type: ignore[no-untyped-def]
    return _like(a, b, dtype)


@torch.library.custom_op("omniq::triton_mx_gemm", mutates_args=())
def mx_gemm(a: list[Tensor], b: list[Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply MX operands with block-scaled tensor core instructions.

    Args:
        a: parts of mxfp8, mxfp4 or mxfp4_dualscale, ``[..., M, K]``.
        b: parts of one of them, ``[N, K]``; coarse scales if a has them.
        bias, dtype: as in `row_scaled_gemm`.

    Returns:
        ``[..., M, N]`` of ``dtype``.
    """
    out = _like(a[0], b[0], dtype)
    return _multiply(launch.mx, out, a=[_rows(part, 1) for part in a], b=b, bias=bias)


@mx_gemm.register_fake
def _(a, b, bias, dtype):  # type: ignore[no-untyped-def]
    return _like(a[0], b[0], dtype)


@torch.library.custom_op("omniq::triton_decoded_gemm", mutates_args=())
def decoded_gemm(
    a: list[Tensor],
    b: Tensor,
    b_block: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    b_rows: int,
    columns: int,
) -> Tensor:
    """Multiply real activations by codes that are decoded in registers.

    Args:
        a: bfloat16 or float16 ``[..., M, K]`` and, or not, float32 scales
            ``[..., M, ceil(K / columns)]`` for it.
        b: float8_e4m3fn ``[N, K]``, e2m1 in uint8 ``[N, K / 2]``, or a's dtype ``[N, K]``.
        b_block: e8m0 in uint8 ``[N, K / 32]``, or None.
        b_scale: float32 ``[ceil(N / b_rows), ceil(K / columns)]``, or ``[N]`` where columns is 0,
            or None.
        b_rows, columns: that share an element of b_scale; columns 0 is all of K.
        bias, dtype: as in `row_scaled_gemm`.

    Returns:
        ``[..., M, N]`` of ``dtype``.
    """
    operands = {"a": [_rows(part, 1) for part in a], "b": b, "b_block": b_block}
    scales = {"b_scale": b_scale, "b_rows": b_rows, "columns": columns}
    return _multiply(launch.decoded, _like(a[0], b, dtype), **operands, **scales, bias=bias)


@decoded_gemm.register_fake
def _(a, b, b_block, b_scale, bias, dtype, b_rows, columns):  # type: ignore[no-untyped-def]
    return _like(a[0], b, dtype)


def _like(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)


def _rows(part: Tensor, keep: int) -> Tensor:
    """Join the leading dimensions of an activation's part, but for the last ``keep``."""
    return part.reshape(-1, *part.shape[part.dim() - keep :])


def _multiply(make: Callable[..., launch.Launch], out: Tensor, **operands: Any) -> Tensor:
    """Launch what ``make`` says about contiguous operands; returns ``out``, filled."""
    if out.numel():
        operands = tree_map_only(Tensor, Tensor.contiguous, operands)
        device = launch.device_of(out.device)
        launch.run(make(**operands, out=out.view(-1, out.shape[-1]), device=device))
    return out
