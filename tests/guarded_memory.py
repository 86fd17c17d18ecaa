"""Runs omniq's C++ on operands that end where memory does: a process of its own, which may crash.

What is read beyond an operand and not used shows in no result, and ends a process where the page
behind it is not mapped.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

from omniq_compile.lowering.cpu import decode, quantize, tile_gemm
from omniq_compile.lowering.cpu.quantize_activation import quantize_activation
from omniq_compile.lowering.formats import get_format

_kept: list[mmap.mmap] = []


def guarded(tensor: Tensor | None) -> Tensor | None:
    """Copy a tensor to before a page that may not be read."""
    if tensor is None:
        return None
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    _kept.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = ctypes.c_void_p(address + size)
    assert ctypes.CDLL(None).mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    flat = torch.frombuffer(
        memory, dtype=torch.uint8, count=tensor.nbytes, offset=size - tensor.nbytes
    )
    copy = flat.view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def multiply(
    weight: str, M: int, K: int, N: int, columns: tuple[int, int, int] = (0, 1, 0)
) -> None:
    """Multiply by a weight in a format, with scales and a bias, and compare with plain memory."""
    parts = list(get_format(weight).quantize(torch.randn(N, K)))
    codes, *scales = parts
    blocks = [scale for scale in scales if scale.dtype is torch.uint8]
    real = [scale for scale in scales if scale.dtype is torch.float32]
    wide = get_format(weight).padded(K)
    a_scale = torch.rand(M, -(-wide // columns[0]) if columns[0] else 1) if real else None
    operands = [
        torch.randn(M, wide).bfloat16(), a_scale, codes, blocks[0] if blocks else None,
        real[0] if real else None, torch.randn(N),
    ]  # fmt: skip
    gemm: Any = torch.ops.omniq.cpu_tile_gemm
    out = gemm(*map(guarded, operands), *columns, torch.float32)
    assert torch.equal(out, gemm(*operands, *columns, torch.float32))


def multiply_all() -> None:
    for M, K, N in ((7, 45, 83), (70, 1075, 65)):
        multiply("fp8", M, K, N)
        multiply("fp8_block_7x96", M, K, N, (128, 7, 96))
        multiply("mxfp8", M, K, N)
        multiply("mxfp4", M, K, N)
        multiply("mxfp4_dualscale", M, K, N, (512, 1, 512))


def quantize_all() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 1075).to(dtype)
        copy = guarded(x)
        assert copy is not None
        for name in quantize.METHODS:
            quantize.quantize(copy, get_format(name))
            if name != "int8":
                quantize_activation(copy, name)
        quantize_activation(copy, "fp8_group_96")


def main() -> None:
    """Say what was run; a crash says nothing."""
    if decode.library.load("quantize") is not None:
        quantize_all()
        print("quantized")
    for path in ("bfloat16", "float32"):
        if path == "float32":
            tile_gemm._library = lambda: None  # type: ignore[assignment]
        if path == "float32" or tile_gemm._library() is not None:
            multiply_all()
            print(f"multiplied in {path}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
