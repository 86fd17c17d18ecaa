"""int8 and e4m3 codes with a float32 scale per row of both operands, applied in the epilogue."""

import triton
import triton.language as tl

from omniq_compile.lowering.triton_kernels.codes import codes_at, load_codes
from omniq_compile.lowering.triton_kernels.tile import clamped, store_tile, tile_origin


@triton.jit
def store_scaled(
    out_ptr, bias_ptr, a_scale_ptr, b_scale_ptr, sums, m0, n0, M, N,
    FNUZ: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store a tile's sums times the scales of its rows and columns, with bias."""
    a_scale = tl.load(a_scale_ptr + m0 + clamped(m0, M, BLOCK_M))
    if FNUZ:
        a_scale *= 4
    real = sums.to(tl.float32) * a_scale[:, None]
    real *= tl.load(b_scale_ptr + n0 + clamped(n0, N, BLOCK_N))[None, :]
    store_tile(out_ptr, bias_ptr, real, m0, n0, M, N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def row_scaled_gemm(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    INTEGER: tl.constexpr,
    FNUZ: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Multiply a ``[M, K]`` by b ``[N, K]``, scales ``[M]`` and ``[N]``, bias ``[N]`` or None.

    INTEGER: int8 codes, summed exactly in int32. e4m3 products are summed as the tensor cores do,
    Hopper's with about 14 bits, like the fast accumulation of `torch._scaled_mm`; where BLOCK_M is
    1, without tensor cores, in float32. FNUZ: e4m3 codes, multiplied as fnuz ones. PERSISTENT: each
    program computes several tiles, which the copy engine of Hopper (TMA) loads for groups of warps
    that multiply: K is a multiple of 16, and what lies outside reads as zero.
    """
    sums_type: tl.constexpr = tl.int32 if INTEGER else tl.float32
    if PERSISTENT:
        a_tiles = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
        b_tiles = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        # One group of warps loads, and two more multiply half of the rows each.
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=True):
            m0, n0 = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            sums = tl.zeros((BLOCK_M, BLOCK_N), sums_type)
            for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
                a = a_tiles.load([m0, k * BLOCK_K])
                b = b_tiles.load([n0, k * BLOCK_K])
                sums = tl.dot(a, b.T, sums, out_dtype=sums_type)
            # The second group gets its half's first row for m0, at which its a is loaded, and a
            # `tl.arange` that begins there too (Triton 3.6 and 3.7). Only one may count.
            m0 &= -BLOCK_M
            store_scaled(
                out_ptr, bias_ptr, a_scale_ptr, b_scale_ptr, sums, m0, n0, M, N,
                FNUZ, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        m0, n0 = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
        a_at, b_at = codes_at(a_ptr, b_ptr, m0, n0, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K)
        if BLOCK_M == 1:
            products = tl.zeros((BLOCK_K, BLOCK_N), sums_type)
        else:
            sums = tl.zeros((BLOCK_M, BLOCK_N), sums_type)
        for k0 in range(0, K, BLOCK_K):
            a, b = load_codes(a_at, b_at, K - k0, FNUZ, EVEN_K, BLOCK_K)
            if BLOCK_M == 1:
                products += tl.trans(a.to(sums_type)) * b.to(sums_type)
            else:
                sums = tl.dot(a, b, sums, out_dtype=sums_type)
            a_at += BLOCK_K
            b_at += BLOCK_K
        if BLOCK_M == 1:
            sums = tl.sum(products, axis=0)[None, :]
        store_scaled(
            out_ptr, bias_ptr, a_scale_ptr, b_scale_ptr, sums, m0, n0, M, N,
            FNUZ, BLOCK_M, BLOCK_N,
        )  # fmt: skip
