"""Decodes rows of a weight to float32: by decode.cpp, or in torch where that cannot be built."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from omniq_compile.lowering.cpu import library
from omniq_compile.lowering.formats import mxfp4, mxfp8
from omniq_compile.lowering.formats.blocks import repeat
from omniq_compile.lowering.formats.float_codes import decode_e4m3


class _Arguments(ctypes.Structure):
    """``Arguments`` of decode.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "block_scale", "scale", "out")),
        *((name, ctypes.c_int64) for name in ("K", "row_bytes", "scale_rows", "scale_columns")),
        *((name, ctypes.c_int64) for name in ("e2m1", "first", "count", "threads")),
    )


def decode_rows(
    codes: Tensor,
    block_scale: Tensor | None,
    scale: Tensor | None,
    shared: tuple[int, int],
    rows: range,
    out: Tensor,
) -> None:
    """Write the values of some rows of a weight, each exact but for the product with ``scale``.

    Args:
        codes: ``torch.float8_e4m3fn`` ``[N, K]``, or uint8 ``[N, K / 2]``, two e2m1 codes a byte
            with even k in the low nibble; contiguous, as are the others.
        block_scale: uint8 e8m0 ``[N, K / 32]``, or None (only with e4m3).
        scale: float32 ``[ceil(N / r), ceil(K / c)]``, or None.
        shared: r and c, how many rows and columns share a ``scale``; c is a multiple of 32.
        rows: the R of them that are decoded.
        out: float32 ``[R, K]``.

    Raises:
        RuntimeError: the C++ reports an error, with its message.
    """
    if (built := _library()) is None:
        out.copy_(_in_torch(codes, block_scale, scale, shared, rows))
        return
    arguments = _Arguments(
        *(library.pointer(part) for part in (codes, block_scale, scale, out)),
        *(out.shape[1], codes.shape[1], *shared),
        *(codes.dtype == torch.uint8, rows.start, len(rows), torch.get_num_threads()),
    )
    library.call(built.omniq_decode, arguments)


@cache
def _library() -> ctypes.CDLL | None:
    return library.load("decode")


def _in_torch(
    codes: Tensor,
    block_scale: Tensor | None,
    scale: Tensor | None,
    shared: tuple[int, int],
    rows: range,
) -> Tensor:
    part = slice(rows.start, rows.stop)
    if block_scale is None:
        values = decode_e4m3(codes[part])
    else:
        form = mxfp4 if codes.dtype == torch.uint8 else mxfp8
        values = form.dequantize((codes[part], block_scale[part]))
    if scale is None:
        return values
    scale = repeat(scale, -2, shared[0], codes.shape[0])[part]
    return values * repeat(scale, -1, shared[1], values.shape[1])
