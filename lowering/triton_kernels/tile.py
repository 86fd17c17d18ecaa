"""Device code that every GEMM here shares: which tile a program computes, and how it is stored.

No kernel is specialized on M, which changes from call to call: compiled once, it takes any.
"""

import triton
import triton.language as tl


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the first row and column of a tile by its number.

    Those that are computed at the same time share GROUP_M rows of tiles, so that the tiles of a and
    b that they read stay in the L2 cache.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    inside = tile % (GROUP_M * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + inside % rows
    tile_n = inside // rows
    return tile_m * BLOCK_M, tile_n * BLOCK_N


@triton.jit
def clamped(first, size, BLOCK: tl.constexpr):
    """Return 0 to BLOCK - 1, but for those beyond ``size - first`` the last one inside.

    Rows that do not exist are read from the last one that does, and never stored: the loop over K
    needs no mask along M and N.
    """
    return tl.minimum(tl.arange(0, BLOCK), size - 1 - first)


@triton.jit
def store_tile(out_ptr, bias_ptr, sums, m0, n0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add the bias to float32 ``sums`` and round once to the dtype of ``out [M, N]``."""
    m = tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[None, :]
    # M times N can pass 2**31.
    at = out_ptr + m0.to(tl.int64) * N + m[:, None] * N + n[None, :]
    inside = (m < M - m0)[:, None] & (n < N)[None, :]
    tl.store(at, sums.to(out_ptr.dtype.element_ty), mask=inside)
