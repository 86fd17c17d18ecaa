"""``omniq::cpu_tile_gemm``: BF16 activations times a weight that is decoded tile by tile.

tile_gemm.cpp multiplies in BF16. Where the CPU has no fast BF16 products, or it cannot be built,
tiles are decoded to float32 and multiplied by torch's float32 GEMM. Either is one operator for
every shape: loops that Inductor generates to decode each shape of weight, and to round each shape
of result, made a first call three times as long.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from omniq_compile.lowering.bias import check_bias
from omniq_compile.lowering.cpu import library
from omniq_compile.lowering.cpu.decode import decode_rows
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.lowering.formats.blocks import repeat
from omniq_compile.lowering.integer_matmul import TILE_ELEMENTS
from omniq_compile.lowering.target import Target, detect

E4M3, E2M1 = 0, 1
_RESULTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Arguments(ctypes.Structure):
    """``Arguments`` of tile_gemm.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "a_scale", "codes", "block_scale", "b_scale")),
        *((name, ctypes.c_void_p) for name in ("bias", "out")),
        *((name, ctypes.c_int64) for name in ("M", "N", "K", "b_bytes", "a_columns", "b_rows")),
        *((name, ctypes.c_int64) for name in ("b_columns", "element", "result")),
    )


@torch.library.custom_op("omniq::cpu_tile_gemm", mutates_args=(), device_types="cpu")
def cpu_tile_gemm(
    a: Tensor,
    a_scale: Tensor | None,
    codes: Tensor,
    block_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    a_columns: int,
    b_rows: int,
    b_columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``(a * a_scale) @ (b * b_scale).T + bias``, rounded to ``dtype`` once.

    Args:
        a: bfloat16 ``[..., M, K]``.
        a_scale: float32 ``[..., M, ceil(K / a_columns)]``, or None.
        codes: of b: ``torch.float8_e4m3fn`` ``[N, K]``, or uint8 ``[N, K / 2]``, two e2m1 codes a
            byte with even k in the low nibble.
        block_scale: of b: uint8 e8m0 ``[N, K / 32]``, or None (only with e4m3).
        b_scale: float32 ``[ceil(N / b_rows), ceil(K / b_columns)]``, or None where a_scale is.
        bias: ``[N]`` of any float dtype, or None.
        a_columns, b_columns: of K that share a scale, 0 for all of them; multiples of 32.
        b_rows: of b that share a scale.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[..., M, N]``.

    Raises:
        OmniqError: the bias is not ``[N]``, or a has scales and b has none.
        RuntimeError: the C++ reports an error, with its message.
    """
    N, K = codes.shape[0], a.shape[-1]
    check_bias("omniq::cpu_tile_gemm", bias, N)
    if a_scale is not None and b_scale is None:
        raise OmniqError("omniq::cpu_tile_gemm: a has scales, and b has none.")
    out = a.new_empty((*a.shape[:-1], N), dtype=dtype)
    if out.numel() == 0:
        return out
    rows = a.reshape(-1, K)
    if a_scale is not None:
        a_scale = a_scale.reshape(rows.shape[0], -1).contiguous()
    if b_scale is not None:
        b_scale = b_scale.reshape(-(-N // b_rows), -1).contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    codes = codes.contiguous()
    if block_scale is not None:
        block_scale = block_scale.contiguous()
    # brgemm refuses to run where the caller has turned oneDNN off.
    if not torch.backends.mkldnn.enabled or (built := _library()) is None:
        shared = (b_rows, b_columns or K)
        into = out.view(rows.shape[0], N)
        _in_float32(rows, a_scale, codes, block_scale, b_scale, bias, a_columns or K, shared, into)
        return out
    # brgemm reads pairs along K.
    rows = (F.pad(rows, (0, 1)) if K % 2 else rows).contiguous()
    columns = (a_columns or rows.shape[1], b_columns or rows.shape[1])
    arguments = _Arguments(
        library.pointer(rows),
        library.pointer(a_scale),
        library.pointer(codes),
        library.pointer(block_scale),
        library.pointer(b_scale),
        library.pointer(bias),
        library.pointer(out),
        *(rows.shape[0], N, rows.shape[1], codes.shape[1], columns[0], b_rows, columns[1]),
        E2M1 if codes.dtype == torch.uint8 else E4M3,
        _RESULTS[dtype],
    )
    library.call(built.omniq_tile_gemm, arguments)
    return out


@cpu_tile_gemm.register_fake
def _(
    a: Tensor,
    a_scale: Tensor | None,
    codes: Tensor,
    block_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    a_columns: int,
    b_rows: int,
    b_columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((*a.shape[:-1], codes.shape[0]), dtype=dtype)


@cache
def _library() -> ctypes.CDLL | None:
    if detect("cpu") != Target("cpu", "avx512_bf16"):
        return None
    built = library.load("tile_gemm")
    return built if built is not None and built.omniq_tile_gemm_supported() else None


def _in_float32(
    rows: Tensor,
    a_scale: Tensor | None,
    codes: Tensor,
    block_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    a_columns: int,
    shared: tuple[int, int],
    out: Tensor,
) -> None:
    """Write the product into out ``[M, N]``; ``shared`` are the rows and columns of a b_scale."""
    a = rows.to(torch.float32)
    (M, K), N = a.shape, codes.shape[0]
    factors = None
    if b_scale is not None and shared[1] == K and (a_scale is None or a_columns == K):
        factors = repeat(b_scale, -2, shared[0], N).view(1, N)
        b_scale = None
    elif a_scale is not None:
        a = a * repeat(a_scale, -1, a_columns, K)
    tile = min(N, max(1, TILE_ELEMENTS // K))
    values, sums = a.new_empty(tile, K), a.new_empty(M * tile)
    for first in range(0, N, tile):
        part = range(first, min(first + tile, N))
        columns = slice(first, part.stop)
        decode_rows(codes, block_scale, b_scale, shared, part, values[: len(part)])
        result = sums[: M * len(part)].view(M, len(part))
        # A caller's autocast leaves what is given an ``out`` as it is.
        torch.mm(a, values[: len(part)].t(), out=result)
        if factors is not None:
            if a_scale is not None:
                result.mul_(a_scale)
            result.mul_(factors[:, columns])
        if bias is not None:
            result += bias[columns]
        out[:, columns] = result
