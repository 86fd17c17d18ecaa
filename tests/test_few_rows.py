"""One row by a weight on sm_90: exact sums, for every method, and for few rows alone."""

from __future__ import annotations

import pytest
import torch
from conftest import error

from omniq_compile.lowering import reference, registry
from omniq_compile.lowering.cuda import few_rows
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme, get_scheme
from omniq_compile.lowering.target import Target

KERNELS = {kernel.method: kernel for kernel in (few_rows.INT8, *few_rows.DECODED)}
SCHEMES = [
    get_scheme("int8"), get_scheme("mxfp8"), get_scheme("mxfp4"), get_scheme("mxfp4", 2),
    get_scheme("mxfp4_dualscale"), get_scheme("mxfp4_dualscale", 2),
]  # fmt: skip
BF16 = torch.bfloat16


def problem(scheme: Scheme, *rows: int, K: int = 1057, N: int = 83) -> Problem:
    count = torch.Size(rows).numel()
    return Problem(count, K, N, len(rows) + 1, 2, torch.float32)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.weight)
def test_it_multiplies_as_the_reference_does(scheme: Scheme, compiler: str) -> None:
    kernel: Kernel = KERNELS[scheme.method]
    for rows in ((1,), (1, 1), (2, 1)):
        it = problem(scheme, *rows)
        if few_rows.MOST_ROWS[scheme.method] < it.M:
            continue
        x = torch.randn(*rows, it.K).to(BF16)
        form = get_format(scheme.weight)
        weight, bias = form.quantize(torch.randn(it.N, it.K)), torch.randn(it.N)

        def multiply(x: torch.Tensor, it: Problem = it, weight=weight, bias=bias) -> torch.Tensor:  # type: ignore[no-untyped-def]
            a = kernel.quantize(x, scheme.activation)
            return kernel.gemm(a, weight, bias, it, scheme)

        out = torch.compile(multiply, backend=compiler, fullgraph=True)(x)
        codes = get_format(scheme.activation).quantize(x)
        formats = scheme.activation, scheme.weight
        assert out.shape == (*rows, it.N)
        assert error(out, reference.gemm(codes, weight, bias, *formats, torch.float64)) < 1e-6
        exact = x.double() @ form.dequantize(weight)[:, : it.K].double().t() + bias
        assert error(out, exact) < 0.2


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.weight)
def test_it_is_chosen_for_few_rows_alone(scheme: Scheme) -> None:
    most, target = few_rows.MOST_ROWS[scheme.method], Target("cuda", "sm_90")
    few, why = registry.choose(scheme, target, problem(scheme, most))
    assert few is KERNELS[scheme.method]
    assert why == ""
    more, why = registry.choose(scheme, target, problem(scheme, most + 1))
    assert more is not few
    assert f"M = {most + 1}, and it is for up to {most}" in why
    other, _ = registry.choose(scheme, Target("cuda", "sm_89"), problem(scheme, 1))
    assert other not in KERNELS.values()


def test_it_takes_no_two_activations() -> None:
    it = Problem(1, 64, 48, 2, 2, BF16, b_is_weight=False)
    assert "both operands are activations" in str(few_rows.INT8.refuse(it, get_scheme("int8")))
