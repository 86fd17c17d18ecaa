"""MX operands multiplied by block-scaled instructions, with coarse scales or without."""

import triton
import triton.language as tl

from omniq_compile.lowering.triton_kernels.tile import clamped, store_tile, tile_origin


@triton.jit
def mx_sums(
    a_at,
    a_scale_at,
    b_at,
    b_scale_at,
    first,
    last,
    A_ELEMENT: tl.constexpr,
    B_ELEMENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum the products of k from ``first`` to ``last``, whole blocks of 32, in float32."""
    A_PACK: tl.constexpr = 2 if A_ELEMENT == "e2m1" else 1
    B_PACK: tl.constexpr = 2 if B_ELEMENT == "e2m1" else 1
    a_k = tl.arange(0, BLOCK_K // A_PACK)
    b_k = tl.arange(0, BLOCK_K // B_PACK)
    block = tl.arange(0, BLOCK_K // 32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(first, last, BLOCK_K):
        a_here = a_at + k0 // A_PACK + a_k[None, :]
        b_here = b_at + k0 // B_PACK + b_k[:, None]
        a_scale_here = a_scale_at + k0 // 32 + block[None, :]
        b_scale_here = b_scale_at + k0 // 32 + block[None, :]
        if EVEN_K:
            a = tl.load(a_here)
            b = tl.load(b_here)
            a_scale = tl.load(a_scale_here)
            b_scale = tl.load(b_scale_here)
        else:
            left = last - k0
            a = tl.load(a_here, mask=(a_k < left // A_PACK)[None, :], other=0.0)
            b = tl.load(b_here, mask=(b_k < left // B_PACK)[:, None], other=0.0)
            inside = (block < left // 32)[None, :]
            a_scale = tl.load(a_scale_here, mask=inside, other=127)
            b_scale = tl.load(b_scale_here, mask=inside, other=127)
        sums = tl.dot_scaled(a, a_scale, A_ELEMENT, b, b_scale, B_ELEMENT, sums)
    return sums


@triton.jit(do_not_specialize=["M"])
def mx_gemm(
    a_ptr,
    a_scale_ptr,
    a_coarse_ptr,
    b_ptr,
    b_scale_ptr,
    b_coarse_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    A_ELEMENT: tl.constexpr,
    B_ELEMENT: tl.constexpr,
    RUN: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Multiply a ``[M, K]`` by b ``[N, K]`` of MX elements "e4m3" or "e2m1" (two in a byte).

    K is whole blocks of 32, whose e8m0 scales are ``[M, K / 32]`` and ``[N, K / 32]``. Coarse
    scales, float32 per RUN of K, ``[M, ceil(K / RUN)]`` and ``[N, ceil(K / RUN)]``, are given for
    both operands or for none; BLOCK_K divides RUN.
    """
    A_PACK: tl.constexpr = 2 if A_ELEMENT == "e2m1" else 1
    B_PACK: tl.constexpr = 2 if B_ELEMENT == "e2m1" else 1
    m0, n0 = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = clamped(m0, M, BLOCK_M)
    columns = clamped(n0, N, BLOCK_N)
    a_at = a_ptr + m0.to(tl.int64) * (K // A_PACK) + (rows * (K // A_PACK))[:, None]
    b_at = b_ptr + n0.to(tl.int64) * (K // B_PACK) + (columns * (K // B_PACK))[None, :]
    a_scale_at = a_scale_ptr + ((m0 + rows) * (K // 32))[:, None]
    b_scale_at = b_scale_ptr + ((n0 + columns) * (K // 32))[:, None]
    if a_coarse_ptr is None:
        sums = mx_sums(
            a_at, a_scale_at, b_at, b_scale_at, 0, K,
            A_ELEMENT, B_ELEMENT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        a_coarse_at = a_coarse_ptr + (m0 + rows) * tl.cdiv(K, RUN)
        b_coarse_at = b_coarse_ptr + (n0 + columns) * tl.cdiv(K, RUN)
        for first in range(0, K, RUN):
            run = mx_sums(
                a_at, a_scale_at, b_at, b_scale_at, first, tl.minimum(first + RUN, K),
                A_ELEMENT, B_ELEMENT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            run *= tl.load(a_coarse_at + first // RUN)[:, None]
            sums += run * tl.load(b_coarse_at + first // RUN)[None, :]
    store_tile(out_ptr, bias_ptr, sums, m0, n0, M, N, BLOCK_M, BLOCK_N)
