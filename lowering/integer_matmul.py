"""``omniq::int8_matmul``: exact s8 x s8 -> s32 products where `torch._int_mm` does not serve.

`torch._int_mm` takes two matrices, is fast only with VNNI, and allocates its result anew at each
call. This operator takes batches, multiplies through float32 where the integer instruction is
missing, and uses memory again. float32 holds every integer up to 2**24, so a product over at most
``2**24 // 127**2`` elements of K is exact whatever order it is summed in; the partial sums are
added as int32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omniq_compile.lowering import recycled

EXACT_K = 1024
assert EXACT_K * 127**2 < 2**24

# Elements of b decoded to float32 at a time: 4 MiB, which stays in a core's cache and keeps the
# memory held by a decoded weight constant.
TILE_ELEMENTS = 1 << 20


@torch.library.custom_op("omniq::int8_matmul", mutates_args=())
def int8_matmul(a: Tensor, b: Tensor, use_int_mm: bool) -> Tensor:
    """Return ``a @ b.transpose(-1, -2)`` as int32, exactly.

    Args:
        a: int8 ``[..., M, K]``, codes in [-127, 127].
        b: int8 ``[N, K]`` or ``[..., N, K]``; leading dimensions broadcast against a's.
        use_int_mm: multiply with `torch._int_mm`, else through float32.
    """
    multiply = _matmul_int_mm if use_int_mm else _matmul_float32
    if b.dim() == 2:
        rows = multiply(a.reshape(-1, a.shape[-1]), b)
        return rows.view(*a.shape[:-1], b.shape[0])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = torch.empty(*batch, a.shape[-2], b.shape[-2], dtype=torch.int32, device=a.device)
    count = math.prod(batch)
    a_batch = a.expand(*batch, *a.shape[-2:]).reshape(count, *a.shape[-2:])
    b_batch = b.expand(*batch, *b.shape[-2:]).reshape(count, *b.shape[-2:])
    for result, left, right in zip(out.view(count, *out.shape[-2:]), a_batch, b_batch, strict=True):
        result.copy_(multiply(left, right))
    return out


@int8_matmul.register_fake
def _(a: Tensor, b: Tensor, use_int_mm: bool) -> Tensor:
    batch = a.shape[:-2] if b.dim() == 2 else torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-2]), dtype=torch.int32)


def _matmul_int_mm(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[-1] == 1:
        # torch 2.11's CPU kernel returns wrong sums for K = 1.
        return a.to(torch.int32) * b.to(torch.int32).t()
    if a.device.type != "cpu":
        return torch._int_mm(a, b.t())
    # Inductor gives a dimension of one element any stride, at which oneDNN's GEMM writes nothing
    # (github.com/pytorch/pytorch/issues/195066). A view has strides of its own.
    a, b = a.view(a.shape), b.view(b.shape)
    return torch._int_mm(a, b.t(), out=recycled.empty((a.shape[0], b.shape[0]), torch.int32))


def _matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    (M, K), N = a.shape, b.shape[0]
    real = a.to(torch.float32)
    out = torch.empty(M, N, dtype=torch.int32, device=a.device)
    tile = max(1, TILE_ELEMENTS // min(K, EXACT_K))
    for n in range(0, N, tile):
        for k in range(0, K, EXACT_K):
            decoded = b[n : n + tile, k : k + EXACT_K].to(torch.float32)
            # A caller's autocast would round the sums.
            with torch.autocast(a.device.type, enabled=False):
                sums = (real[:, k : k + EXACT_K] @ decoded.t()).to(torch.int32)
            if k == 0:
                out[:, n : n + tile] = sums
            else:
                out[:, n : n + tile] += sums
    return out
