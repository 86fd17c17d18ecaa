"""Each kernel that a machine offers against a product in float64, on any device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from omniq_compile.lowering import registry
from omniq_compile.lowering.formats import block_size, get_format, mxfp4_dualscale
from omniq_compile.lowering.formats.blocks import pad_last, repeat
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import METHODS, Scheme, get_scheme, w4a8
from omniq_compile.lowering.target import Target, detect
from omniq_compile.lowering.triton_kernels import launch, ops
from omniq_compile.lowering.triton_kernels.tiles import Tile

# M, K and N all different: aligned, ragged, with one block of K left over, few rows, long K.
SHAPES = [
    (64, 256, 384), (130, 257, 131), (33, 264, 136), (1, 320, 192), (16, 512, 48), (17, 1040, 80),
    (129, 3072, 272), (132, 1024, 384),
]  # fmt: skip

# For one quick look at each kernel: some take no odd K or N, some only multiples of 16 or 32.
RAGGED = [(130, 257, 131), (33, 264, 136), (17, 1040, 80), (129, 3072, 272), (132, 1024, 384)]

# A row of its own, which has its own loop.
ONE_ROW = (1, 1057, 83)

# Operands are the same codes, so what is left is the rounding of the result and the order of the
# sums.
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 2e-3, torch.float32: 1e-5}

# The fp8 tensor cores of Ada and Hopper cut the products of a step, and the sum so far, to 13 bits
# after the first; omniq's kernels leave the sums of a row or block to them. A model of that, in
# `test_gpu_checks_on_cpu.py`, is off by 2.1e-4 over 256 products and by 1.2e-3 over 3072.
SHORT_SUMS = {"sm_89", "sm_90"}
SHORT_SUMS_LIMIT = 2e-3

# A compiled kernel on a GPU multiplies by 1 / 127 and divides with an error of 2 units in the last
# place, so that a value midway between two codes may take the other one. A model of that, in
# `test_gpu_checks_on_cpu.py`, moves results by up to 2.2e-2, which is more than many a mistake: so
# each value may be as far from x as it should be, up to 16 units in the last place of x, and a
# product is compared with that of the values it was made of.
MIDWAY = 2.0**-20


def kernels_on(target: Target) -> list[Kernel]:
    return [k for method in METHODS for k in registry.candidates(method, target)]


def schemes_of(method: str) -> list[Scheme]:
    """Return every pair of formats that a method may multiply in."""
    if method == "fp8":
        return [get_scheme("fp8"), *(get_scheme("fp8", 0, b) for b in ((128, 128), (64, 32)))]
    if method == "mxfp4":
        ocp, uos = get_scheme("mxfp4"), get_scheme("mxfp4", 2)
        return [ocp, uos, w4a8(ocp)]
    if method == "mxfp4_dualscale":
        return [get_scheme(method), get_scheme(method, 2)]
    return [get_scheme(method)]


def limit_of(kernel: Kernel, dtype: torch.dtype, arch: str) -> float:
    """Return the worst error that results of a dtype may have on an architecture."""
    short = kernel.native and kernel.method == "fp8" and arch in SHORT_SUMS
    return max(LIMITS[dtype], SHORT_SUMS_LIMIT if short else 0)


@dataclass(frozen=True)
class Case:
    """A problem, and what a kernel multiplies there."""

    problem: Problem
    x: torch.Tensor
    weight: list[torch.Tensor]
    bias: torch.Tensor | None


def problems(
    kernel: Kernel, scheme: Scheme, shape: tuple[int, int, int]
) -> Iterator[tuple[Problem, tuple[int, ...]]]:
    """Yield what the kernel takes among all result dtypes and ranks, and the rows of x."""
    M, K, N = shape
    for dtype in LIMITS:
        for rows in ((M,), (2, M)):
            problem = Problem(math.prod(rows), K, N, 1 + len(rows), 2, dtype)
            if kernel.refuse(problem, scheme) is None:
                yield problem, rows


def ragged_shape(kernel: Kernel) -> tuple[int, int, int]:
    """Return the shape of `RAGGED` of which the kernel takes the most dtypes, ranks and schemes."""
    schemes = schemes_of(kernel.method)
    return max(RAGGED, key=lambda shape: sum(len([*problems(kernel, s, shape)]) for s in schemes))


def check_kernel(kernel: Kernel, device: str, compiler: str, shapes: Any = SHAPES) -> int:
    """Compare a kernel with the reference wherever it does not refuse; returns how often.

    One program has all dtypes and ranks of a scheme and shape, whose kernels are compiled side by
    side: a program for each would take several times as long. They share no operand, so that each
    is computed as on its own.
    """
    count = 0
    for scheme in schemes_of(kernel.method):
        for shape in shapes:
            cases = []
            for problem, rows in problems(kernel, scheme, shape):
                cases.append(_case(problem, scheme, rows, device, seed=problem.K + count))
                count += 1
            if cases:
                _compare(kernel, scheme, cases, compiler)
    return count


def _case(problem: Problem, scheme: Scheme, rows: tuple[int, ...], device: str, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, problem.K, generator=generator)
    w = torch.randn(problem.N, problem.K, generator=generator)
    if rows[-1] > 1:
        x[..., 0, :] = 0  # a row without any scale
    # Half of the cases have one, in either rank.
    bias = torch.randn(problem.N, generator=generator) if (rows[-1] + len(rows)) % 2 else None
    x, w = (t.to(device, problem.dtype) for t in (x, w))
    bias = None if bias is None else bias.to(device, problem.dtype)
    return Case(problem, x, list(get_format(scheme.weight).quantize(w)), bias)


def _compare(kernel: Kernel, scheme: Scheme, cases: list[Case], compiler: str) -> None:
    def run(inputs: list[Any]) -> list[Any]:
        results = []
        for case, (x, weight, bias) in zip(cases, inputs, strict=True):
            a = kernel.quantize(x, scheme.activation)
            b = kernel.arrange(weight)
            results.append((kernel.gemm(a, b, bias, case.problem, scheme), tuple(a)))
        return results

    torch._dynamo.reset()
    inputs = [(case.x, case.weight, case.bias) for case in cases]
    try:
        results = torch.compile(run, backend=compiler, fullgraph=True)(inputs)
    except Exception as error:
        error.add_note(f"{kernel.name}, {scheme}: one of {[case.problem for case in cases]}")
        raise
    for case, (out, found) in zip(cases, results, strict=True):
        _check(kernel, scheme, case, out, found)


def _check(
    kernel: Kernel, scheme: Scheme, case: Case, out: torch.Tensor, found: tuple[torch.Tensor, ...]
) -> None:
    problem, x, parts, bias = case.problem, case.x, case.weight, case.bias
    where = f"{kernel.name}, {scheme}, {problem}"
    weight = get_format(scheme.weight).dequantize(parts)[..., : problem.K].double()
    if len(found) == 1 and torch.equal(found[0], x):  # weights only
        values = x.double()
    else:
        values = values_of(found, scheme.activation)
        off = misplaced(values, x, scheme.activation)
        assert off == 0, f"{where}: {off} values of x are not on their codes"
    expected = values[..., : problem.K] @ weight.t() + (0 if bias is None else bias)
    limit = limit_of(kernel, problem.dtype, detect(x.device).arch)
    assert out.shape == (*x.shape[:-1], problem.N), where
    assert out.dtype is problem.dtype, where
    error = _error(out, expected)
    assert error < limit, f"{where}: error {error:.2e}"
    if x.shape[-2] == 1:  # a row with a scale
        return
    zero = torch.zeros_like(out[..., 0, :]) if bias is None else bias.expand_as(out[..., 0, :])
    assert torch.equal(out[..., 0, :], zero), f"{where}: a row of zeros is not the bias"


def values_of(found: tuple[torch.Tensor, ...], format: str) -> torch.Tensor:
    """Return what a quantized activation stands for, codes or values: float64 ``[..., K']``."""
    form = get_format(format)
    if [part.dtype for part in found] == [part.dtype for part in form.allocate(found[0])]:
        return form.dequantize(found).double()
    values, *scales = (part.double() for part in found)
    group = block_size(format)
    for scale in scales:
        per_row = scale.dim() < values.dim()
        columns = group[1] if group else mxfp4_dualscale.RUN
        whole = scale.unsqueeze(-1) if per_row else repeat(scale, -1, columns, values.shape[-1])
        values = values * whole
    return values


def misplaced(values: torch.Tensor, x: torch.Tensor, format: str) -> int:
    """Count values ``[..., K']`` that a format does not make of ``x [..., K]``; see `MIDWAY`."""
    form = get_format(format)
    expected = form.dequantize(form.quantize(x)).double()
    real = pad_last(x.double(), expected.shape[-1])
    nearer = (values - real).abs() - (expected - real).abs()
    return int((~(nearer.abs() <= MIDWAY * real.abs())).sum())


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def check_int8_tile(tile: Tile, device: str, patch: pytest.MonkeyPatch) -> None:
    """Compare int8 products with integers, in one kind of tile: more of them than SMs."""
    patch.setattr(launch, "choose", lambda *sizes: tile)
    generator = torch.Generator().manual_seed(7)
    a, b = (
        torch.randint(-127, 128, (rows, 272), generator=generator, dtype=torch.int8)
        for rows in (9000, 301)
    )
    ones = [torch.ones(len(codes), device=device) for codes in (a, b)]
    # A persistent tile takes no float32 result, see `launch`.
    dtype = torch.bfloat16 if tile.persistent else torch.float32
    out = ops.row_scaled_gemm(a.to(device), ones[0], b.to(device), ones[1], None, dtype, False)
    # The sums are under 2**24, so that float32 holds them: they are rounded once, if at all.
    assert torch.equal(out.cpu(), (a.double() @ b.double().t()).to(dtype))


def check_large_result(tile: Tile, device: str, patch: pytest.MonkeyPatch) -> None:
    """Compare the last rows of a result of more than 2**31 elements: offsets of 64 bits."""
    patch.setattr(launch, "choose", lambda *sizes: tile)
    M, N, last = 70_001, 32_768, 100
    generator = torch.Generator().manual_seed(7)
    a, b = (
        torch.randint(-127, 128, (rows, 64), generator=generator, dtype=torch.int8)
        for rows in (M, N)
    )
    ones = [torch.ones(len(codes), device=device) for codes in (a, b)]
    arguments = (a.to(device), ones[0], b.to(device), ones[1], None, torch.bfloat16, False)
    out = ops.row_scaled_gemm(*arguments)[-last:].cpu()
    assert torch.equal(out, (a[-last:].double() @ b.double().t()).to(torch.bfloat16))
