"""Memory for large results on the CPU, of GEMMs and quantizations, handed on from one to the next.

An int32 result of one layer of a large model takes tens of MiB. glibc gives memory of 32 MiB and
more back to the system when it is freed (``M_MMAP_THRESHOLD`` of mallopt(3)), and trims the top of
its heap, so that each call writes to pages that the kernel has to find and clear first: that took
20 ms of the 460 of a Qwen-Image block.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections import deque

import torch

# Bytes from which a result is taken from here.
LARGE = 8 << 20

# Blocks that wait for a result: the results of two layers are alive at once where they share an
# activation.
KEPT = 2

_lock = threading.Lock()
_free: deque[torch.Tensor] = deque()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a CPU tensor without values, like `torch.empty`.

    Its memory is used again once the tensor and every view of it are gone.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    block = _take(size)
    if block is None:
        block = torch.empty(size, dtype=torch.uint8, device="cpu")
    # torch keeps this object for as long as the storage lives.
    memory = (ctypes.c_char * size).from_address(block.data_ptr())
    weakref.finalize(memory, _release, block).atexit = False
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def _take(size: int) -> torch.Tensor | None:
    """Return the smallest free block that holds a result, if there is one."""
    with _lock:
        blocks = _waiting()
        found = next((block for block in blocks if block.numel() >= size), None)
        _free.extend(block for block in blocks if block is not found)
        return found


def _release(block: torch.Tensor) -> None:
    """Let a block wait for the next result, and drop the smallest ones over `KEPT`."""
    _free.append(block)
    # This runs wherever the last view goes, which can be a thread that holds the lock.
    if _lock.acquire(blocking=False):
        try:
            _free.extend(_waiting()[-KEPT:])
        finally:
            _lock.release()


def _waiting() -> list[torch.Tensor]:
    """Take every free block, the smallest first."""
    blocks = []
    while _free:
        blocks.append(_free.popleft())
    return sorted(blocks, key=torch.numel)
