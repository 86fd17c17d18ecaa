"""Device code that both GEMMs of 8-bit codes share: loading one step of K of both operands."""

import triton
import triton.language as tl

from omniq_compile.lowering.triton_kernels.tile import clamped


@triton.jit
def codes_at(
    a_ptr, b_ptr, m0, n0, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Point at the first step of a ``[BLOCK_M, BLOCK_K]`` and of b ``[BLOCK_K, BLOCK_N]``."""
    k = tl.arange(0, BLOCK_K)
    rows = clamped(m0, M, BLOCK_M)
    columns = clamped(n0, N, BLOCK_N)
    a_at = a_ptr + m0.to(tl.int64) * K + rows[:, None] * K + k[None, :]
    b_at = b_ptr + n0.to(tl.int64) * K + columns[None, :] * K + k[:, None]
    return a_at, b_at


@triton.jit
def load_codes(a_at, b_at, left, FNUZ: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load one step of K, of which ``left`` are inside; the others read as zero.

    FNUZ: e4m3 codes, as e4m3fnuz ones: see `as_fnuz`.
    """
    if EVEN_K:
        a = tl.load(a_at)
        b = tl.load(b_at)
    else:
        inside = tl.arange(0, BLOCK_K) < left
        a = tl.load(a_at, mask=inside[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None], other=0.0)
    if FNUZ:
        a = as_fnuz(a)
        b = as_fnuz(b)
    return a, b


@triton.jit
def as_fnuz(codes):
    """Read e4m3 as e4m3fnuz: the same bits are half the value, but negative zero, fnuz's NaN."""
    byte = codes.to(tl.uint8, bitcast=True)
    return tl.where(byte == 0x80, 0, byte).to(tl.float8e4b8, bitcast=True)
