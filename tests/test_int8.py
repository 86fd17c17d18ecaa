"""int8 arithmetic: against numpy integers, and against full precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniq_compile.lowering import registry
from omniq_compile.lowering.formats import int8
from omniq_compile.lowering.integer_matmul import int8_matmul
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import get_scheme
from omniq_compile.lowering.target import ARCHITECTURES, Target

SCHEME = get_scheme("int8")
KERNELS = [registry.candidates("int8", Target("cpu", arch))[0] for arch in ARCHITECTURES["cpu"]]
by_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)


def numpy_quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric per row, amax / 127, half to even: written from the definition, in numpy."""
    scale = (np.abs(x).max(axis=-1) / np.float32(127)).astype(np.float32)
    divisor = np.where(scale == 0, np.float32(1), scale)[..., None]
    codes = np.clip(np.rint((x / divisor).astype(np.float32)), -127, 127).astype(np.int8)
    return codes, scale


def run(
    kernel: Kernel, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    problem = Problem(x.shape[-2], x.shape[-1], w.shape[-2], x.dim(), w.dim(), x.dtype)
    return kernel.gemm(kernel.quantize(x, "int8"), int8.quantize(w), bias, problem, SCHEME)


def decode(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    codes, scale = parts
    return codes.double() * scale.double().unsqueeze(-1)


@given(
    rows=st.integers(1, 9),
    K=st.integers(1, 300),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=60, deadline=None)
def test_codes_and_scales_equal_the_definition(rows: int, K: int, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(2, (rows, K)) * 10.0**exponent).astype(np.float32)
    codes, scale = int8.quantize(torch.from_numpy(x))
    expected_codes, expected_scale = numpy_quantize(x)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert np.array_equal(scale.numpy(), expected_scale)


def test_each_row_errs_by_at_most_half_a_step() -> None:
    x = torch.randn(37, 211) * torch.logspace(-30, 30, 37).unsqueeze(1)
    codes, scale = int8.quantize(x)
    error = (int8.dequantize((codes, scale)).double() - x.double()).abs()
    assert (error <= 0.5001 * scale.double().unsqueeze(1)).all()
    assert codes.abs().amax(-1).eq(127).all()


@by_kernel
@pytest.mark.parametrize(
    ("M", "K", "N"),
    [(1, 64, 33), (5, 64, 1), (5, 1, 3), (17, 1025, 40), (70, 3001, 9), (2, 1100, 1200)],
)
def test_the_integer_part_is_exact(kernel: Kernel, M: int, K: int, N: int) -> None:
    """Against numpy's int64 product, also where every code is at its limit.

    And where the only row of a matrix has no stride, as Inductor may write it.
    """
    use_int_mm = kernel.name == "cpu_s8_int_mm"
    generator = torch.Generator().manual_seed(M + K)
    a = torch.randint(-127, 128, (M, K), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    limits = torch.full_like(a, 127), torch.full_like(b, -127)
    strided = a.as_strided((M, K), (K * (M > 1), 1)), b.as_strided((N, K), (K * (N > 1), 1))
    for left, right in [(a, b), limits, strided]:
        expected = left.numpy().astype(np.int64) @ right.numpy().astype(np.int64).T
        assert np.array_equal(int8_matmul(left, right, use_int_mm).numpy(), expected)


@pytest.mark.parametrize("use_int_mm", [True, False])
@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [((2, 3, 5, 70), (2, 3, 11, 70)), ((2, 3, 5, 70), (3, 11, 70)), ((5, 70), (4, 11, 70)),
     ((3, 1, 5, 70), (2, 11, 70)), ((2, 3, 5, 70), (11, 70)), ((0, 70), (11, 70)),
     ((2, 0, 70), (2, 11, 70)), ((0, 5, 70), (0, 11, 70))],
)  # fmt: skip
def test_batches_broadcast_as_in_matmul(
    use_int_mm: bool, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> None:
    a = torch.randint(-127, 128, a_shape, dtype=torch.int8)
    b = torch.randint(-127, 128, b_shape, dtype=torch.int8)
    expected = torch.matmul(a.double(), b.double().transpose(-1, -2))
    result = int8_matmul(a, b, use_int_mm)
    assert result.dtype is torch.int32
    assert torch.equal(result.double(), expected)
    torch.library.opcheck(int8_matmul, (a, b, use_int_mm))


@by_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(23,), (3, 7), (2, 1, 5)])
def test_a_gemm_is_tight_to_its_codes_and_loose_to_full_precision(
    kernel: Kernel, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    K, N = 515, 130
    x = torch.randn(*shape, K).to(dtype)
    w = (torch.randn(N, K) / math.sqrt(K)).to(dtype)
    bias = torch.randn(N).to(dtype)
    out = run(kernel, x, w, bias)
    assert out.shape == (*shape, N)
    assert out.dtype is dtype
    decoded = decode(kernel.quantize(x, "int8")) @ decode(int8.quantize(w)).T
    tight = (out.double() - (decoded + bias.double())).abs()
    # Two scales and a bias in float32, then one rounding to dtype.
    rounding = torch.finfo(dtype).eps / 2 + 3 * torch.finfo(torch.float32).eps
    assert (tight <= rounding * (decoded.abs() + bias.double().abs())).all()
    exact = x.double() @ w.double().T + bias.double()
    assert (out.double() - exact).norm() / exact.norm() < 0.012


@by_kernel
def test_all_kernels_return_the_same_bits(kernel: Kernel) -> None:
    x, w, bias = torch.randn(9, 777).bfloat16(), torch.randn(50, 777), torch.randn(50)
    reference = int8.gemm(int8.quantize(x), int8.quantize(w), bias, torch.bfloat16)
    assert torch.equal(run(kernel, x, w, bias), reference)


@by_kernel
def test_a_bad_token_stays_alone(kernel: Kernel) -> None:
    x = torch.randn(6, 65)
    x[1, 3], x[2, 4], x[3] = math.nan, math.inf, 0.0
    w = torch.randn(40, 65)
    out = run(kernel, x, w)
    assert not out[1].isfinite().any()
    assert not out[2].isfinite().any()
    assert out[3].eq(0).all()
    good = [0, 4, 5]
    assert torch.equal(out[good], run(kernel, x[good], w))


def test_a_k_that_could_overflow_int32_is_refused() -> None:
    largest = (2**31 - 1) // 127**2
    for kernel in KERNELS:
        assert kernel.refuse(Problem(1, largest, 1, 2, 2, torch.float32), SCHEME) is None
        too_large = Problem(1, largest + 1, 1, 2, 2, torch.float32)
        assert "overflow" in str(kernel.refuse(too_large, SCHEME))
    for target in {target for target, _ in registry.table()}:
        problem = Problem(64, 8 * largest, 64, 2, 2, torch.bfloat16)
        found, why = registry.choose(SCHEME, target, problem)
        assert found is None
        assert "overflow" in why
