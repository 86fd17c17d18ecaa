"""e4m3 codes with float32 scales that change along K, applied in the main loop."""

import triton
import triton.language as tl

from omniq_compile.lowering.triton_kernels.codes import codes_at, load_codes
from omniq_compile.lowering.triton_kernels.tile import clamped, store_tile, tile_origin


@triton.jit(do_not_specialize=["M"])
def block_scaled_gemm(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    A_COLUMNS: tl.constexpr,
    B_ROWS: tl.constexpr,
    B_COLUMNS: tl.constexpr,
    FNUZ: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Multiply a ``[M, K]`` by b ``[N, K]``, with scales per group of a and per block of b.

    A scale stands for 1 x A_COLUMNS of a, ``[M, ceil(K / A_COLUMNS)]``, and for B_ROWS x B_COLUMNS
    of b, ``[ceil(N / B_ROWS), ceil(K / B_COLUMNS)]``. BLOCK_K divides A_COLUMNS and B_COLUMNS, so
    that one step of the loop has one scale of each. Its sums are added in float32: the products of
    a step may be summed with fewer bits by the tensor cores, those of K are not.
    """
    m0, n0 = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = clamped(m0, M, BLOCK_M)
    columns = clamped(n0, N, BLOCK_N)
    a_at, b_at = codes_at(a_ptr, b_ptr, m0, n0, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K)
    a_scale_at = a_scale_ptr + (m0 + rows) * tl.cdiv(K, A_COLUMNS)
    # Where a tile lies in one block of rows, its columns share a scale.
    ONE_ROW: tl.constexpr = B_ROWS % BLOCK_N == 0
    if ONE_ROW:
        b_scale_at = b_scale_ptr + n0 // B_ROWS * tl.cdiv(K, B_COLUMNS)
    else:
        b_scale_at = b_scale_ptr + (n0 + columns) // B_ROWS * tl.cdiv(K, B_COLUMNS)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a, b = load_codes(a_at, b_at, K - k0, FNUZ, EVEN_K, BLOCK_K)
        a_scale = tl.load(a_scale_at + k0 // A_COLUMNS)
        b_scale = tl.load(b_scale_at + k0 // B_COLUMNS)
        step = tl.dot(a, b)
        if ONE_ROW:
            sums += step * (a_scale * b_scale)[:, None]
        else:
            sums += step * a_scale[:, None] * b_scale[None, :]
        a_at += BLOCK_K
        b_at += BLOCK_K
    if FNUZ:
        sums *= 4
    store_tile(out_ptr, bias_ptr, sums, m0, n0, M, N, BLOCK_M, BLOCK_N)
