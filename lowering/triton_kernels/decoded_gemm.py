"""Weights decoded in registers and multiplied by activations in BF16 (or FP16)."""

import triton
import triton.language as tl

from omniq_compile.lowering.triton_kernels.tile import clamped, store_tile, tile_origin

# The bias of a float32 less that of e4m3 and of e2m1.
E4M3_UNBIAS = tl.constexpr(2.0**120)
E2M1_UNBIAS = tl.constexpr(2.0**126)


@triton.jit
def decode_e4m3(code):
    """Decode e4m3 bytes -> float32; a NaN code becomes +-480.

    The fields are put in those of a float32, whose bias is larger by 120. A subnormal is a
    float32 denormal on the way; Triton compiles for GPUs that keep those.
    """
    byte = code.to(tl.int32)
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * E4M3_UNBIAS


@triton.jit
def decode_e2m1(code):
    """Decode e2m1 codes, the low four bits of int32 -> float32; see `decode_e4m3`."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * E2M1_UNBIAS


@triton.jit
def decode_e8m0(code):
    """Decode e8m0 bytes -> float32 ``2**(code - 127)``, and 255 -> NaN."""
    byte = code.to(tl.int32)
    # 2**-127 and NaN have the same mantissa, the top bit.
    special = ((byte == 0) | (byte == 255)).to(tl.int32)
    return ((byte << 23) | (special << 22)).to(tl.float32, bitcast=True)


@triton.jit
def decoded_sums(
    a_at,
    b_at,
    b_block_at,
    first,
    last,
    B_ELEMENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum the products of k from ``first`` to ``last`` in float32, of one row without a dot."""
    B_PACK: tl.constexpr = 2 if B_ELEMENT == "e2m1" else 1
    k = tl.arange(0, BLOCK_K)
    b_k = tl.arange(0, BLOCK_K // B_PACK)
    block = tl.arange(0, BLOCK_K // 32)
    if BLOCK_M == 1:
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(first, last, BLOCK_K):
        left = last - k0
        a_here = a_at + k0 + k[None, :]
        b_here = b_at + k0 // B_PACK + b_k[None, :]
        if EVEN_K:
            a = tl.load(a_here)
            code = tl.load(b_here)
        else:
            a = tl.load(a_here, mask=(k < left)[None, :], other=0)
            code = tl.load(b_here, mask=(b_k < left // B_PACK)[None, :], other=0)
        if B_ELEMENT == "real":
            b = code
        else:
            if B_ELEMENT == "e2m1":
                byte = code.to(tl.int32)
                value = tl.interleave(decode_e2m1(byte), decode_e2m1(byte >> 4))
            else:
                value = decode_e4m3(code)
            if b_block_at is not None:
                b_block_here = b_block_at + k0 // 32 + block[None, :]
                if EVEN_K:
                    exponent = tl.load(b_block_here)
                else:
                    exponent = tl.load(b_block_here, mask=(block < left // 32)[None, :], other=127)
                cut = tl.reshape(value, (BLOCK_N, BLOCK_K // 32, 32))
                value = tl.reshape(cut * decode_e8m0(exponent)[:, :, None], (BLOCK_N, BLOCK_K))
            b = value if BLOCK_M == 1 else value.to(a_at.dtype.element_ty)
        if BLOCK_M == 1:
            products += a.to(tl.float32) * b.to(tl.float32)
        else:
            sums = tl.dot(a, tl.trans(b), sums)
    if BLOCK_M == 1:
        sums = tl.sum(products, axis=1)[None, :]
    return sums


@triton.jit(do_not_specialize=["M"])
def decoded_gemm(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_block_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    B_ELEMENT: tl.constexpr,
    B_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Multiply a ``[M, K]``, BF16 or FP16 values, by b ``[N, K]``.

    B_ELEMENT: "e4m3" or "e2m1" (bytes, decoded here), or "real" (a's dtype). b_block: the e8m0
    scales of MX elements, ``[N, K / 32]``, or None. b_scale: float32, for B_ROWS x COLUMNS of b,
    ``[ceil(N / B_ROWS), ceil(K / COLUMNS)]``, or per row, ``[N]``, where COLUMNS is 0, or None.
    a_scale: float32 for 1 x COLUMNS of a, ``[M, ceil(K / COLUMNS)]``, or None. BLOCK_K divides
    COLUMNS. Decoded elements times their block scales are exact in BF16, and float32 scales are
    applied to float32 sums.
    """
    B_PACK: tl.constexpr = 2 if B_ELEMENT == "e2m1" else 1
    m0, n0 = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = clamped(m0, M, BLOCK_M)
    columns = clamped(n0, N, BLOCK_N)
    a_at = a_ptr + m0.to(tl.int64) * K + (rows * K)[:, None]
    b_at = b_ptr + n0.to(tl.int64) * (K // B_PACK) + (columns * (K // B_PACK))[:, None]
    b_block_at = None
    if b_block_ptr is not None:
        b_block_at = b_block_ptr + ((n0 + columns) * (K // 32))[:, None]
    if COLUMNS == 0:
        sums = decoded_sums(
            a_at, b_at, b_block_at, 0, K, B_ELEMENT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K
        )
        if b_scale_ptr is not None:
            sums *= tl.load(b_scale_ptr + n0 + columns)[None, :]
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        a_scale_at = None
        if a_scale_ptr is not None:
            a_scale_at = a_scale_ptr + (m0 + rows) * tl.cdiv(K, COLUMNS)
        b_scale_at = b_scale_ptr + (n0 + columns) // B_ROWS * tl.cdiv(K, COLUMNS)
        for first in range(0, K, COLUMNS):
            last = tl.minimum(first + COLUMNS, K)
            run = decoded_sums(
                a_at, b_at, b_block_at, first, last, B_ELEMENT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K
            )
            if a_scale_at is not None:
                run *= tl.load(a_scale_at + first // COLUMNS)[:, None]
            sums += run * tl.load(b_scale_at + first // COLUMNS)[None, :]
    store_tile(out_ptr, bias_ptr, sums, m0, n0, M, N, BLOCK_M, BLOCK_N)
