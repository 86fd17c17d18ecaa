"""The checks of `test_gpu.py`, in small on the CPU, so that they are known to run and to fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import gpu_checks as checks
import gpu_kernels
import pytest
import torch
from gpu_division import GpuDivision

from omniq_compile.lowering.formats import get_format, mx, mxfp4
from omniq_compile.lowering.formats.float_codes import encode_e2m1, pack_e2m1
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.target import Target, detect

PLACE = checks.Place("cpu", compiler="eager", width=64, tokens=(16, 8))
QWEN = "QwenImageTransformer2DModel"


def test_a_whole_model_and_its_blocks() -> None:
    checks.whole(QWEN, "int8", PLACE)
    torch._dynamo.reset()
    checks.whole(QWEN, "mxfp8", PLACE, activation_scheme="none")
    torch._dynamo.reset()
    checks.regional(QWEN, "fp8", PLACE)


def test_resolutions() -> None:
    checks.resolutions(QWEN, "int8", PLACE)


@pytest.mark.parametrize("method", ["int8", "mxfp4 W4A8"])
def test_rows(method: str) -> None:
    checks.rows(method, 257, 131, True, PLACE)


def test_channels() -> None:
    checks.channels("fp8", PLACE, side=5)


def test_stored(tmp_path: Path) -> None:
    checks.stored(QWEN, "fp8 block-wise", PLACE, tmp_path)


def test_changed_weights() -> None:
    checks.changed_weights(PLACE)


def test_steady_calls() -> None:
    model, call = checks.steady_calls(PLACE)
    assert call().shape == (64, model[-1].out_features)


KERNELS = gpu_kernels.kernels_on(detect("cpu"))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels(kernel: gpu_kernels.Kernel) -> None:
    assert gpu_kernels.check_kernel(kernel, "cpu", "eager", [(17, 257, 48)]) > 0


def dtypes_of(kernel: gpu_kernels.Kernel, shape: tuple[int, int, int]) -> list[set[torch.dtype]]:
    schemes = gpu_kernels.schemes_of(kernel.method)
    return [{p.dtype for p, _ in gpu_kernels.problems(kernel, s, shape)} for s in schemes]


@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_100", "cuda:sm_120", "rocm:gfx950"])
def test_the_short_run_has_each_kernel_with_all_that_it_takes(target: str) -> None:
    for kernel in gpu_kernels.kernels_on(Target.parse(target)):
        short = dtypes_of(kernel, gpu_kernels.ragged_shape(kernel))
        for shape in gpu_kernels.SHAPES:
            for here, there in zip(dtypes_of(kernel, shape), short, strict=True):
                assert here <= there, kernel.name


def test_one_program_has_all_dtypes_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    programs, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: programs.append(a) or compile(*a, **k))
    kernel = next(k for k in KERNELS if k.method == "int8")
    assert gpu_kernels.check_kernel(kernel, "cpu", "eager", [(17, 40, 48), (3, 64, 32)]) == 12
    assert len(programs) == 2


@pytest.mark.parametrize("kernel", KERNELS[:2], ids=lambda kernel: kernel.name)
def test_a_kernel_that_is_off_by_a_little_is_found(kernel: gpu_kernels.Kernel) -> None:
    """The last of those that one program has."""

    def gemm(a: Any, b: Any, bias: Any, problem: Any, scheme: Any) -> torch.Tensor:
        off = problem.dtype is torch.float32 and problem.a_rank == 3
        return kernel.gemm(a, b, bias, problem, scheme) * (1.01 if off else 1)

    with pytest.raises(AssertionError, match=rf"{kernel.name}.*a_rank=3.*float32.*: error"):
        gpu_kernels.check_kernel(
            dataclasses.replace(kernel, gemm=gemm), "cpu", "eager", [(17, 257, 48)]
        )


def cut(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Drop what is below 13 bits after the first of ``largest``, as tensor cores do."""
    unit = torch.exp2(largest.log2().floor() - 13)
    return (values / unit).trunc() * unit


def short_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply float64 ``[M, K]`` by ``[N, K]`` with sums as Hopper's fp8 tensor cores have."""
    sums = torch.zeros(len(a), len(b), dtype=torch.float64)
    for k in range(0, a.shape[1], 32):
        products = a[:, None, k : k + 32] * b[None, :, k : k + 32]
        terms = torch.cat([products, sums.unsqueeze(-1)], -1)
        sums = cut(terms, terms.abs().amax(-1, keepdim=True)).sum(-1)
        sums = cut(sums, sums.abs())
    return sums


def limit(arch: str, name: str) -> float:
    (kernel,) = (k for k in gpu_kernels.kernels_on(Target("cuda", arch)) if k.name == name)
    return gpu_kernels.limit_of(kernel, torch.float32, arch)


@pytest.mark.parametrize("K", [256, 3072])
def test_a_limit_holds_what_fp8_sums_lose_and_only_there(K: int) -> None:
    a, b = (torch.randn(rows, K).to(torch.float8_e4m3fn).double() for rows in (16, 24))
    lost = checks.relative(short_sums(a, b), a @ b.t())
    for arch in ("sm_90", "sm_89"):
        assert limit(arch, "cuda_fp8_float32") < lost < limit(arch, "cuda_fp8_triton")
    assert lost > limit("sm_100", "cuda_fp8_triton")


DIVIDED = ["int8", "fp8", "fp8_group_128", "mxfp4_dualscale", "mxfp4_dualscale_uos"]
DIVISIONS = [-2, -1, 1, 2, None]


@pytest.mark.parametrize("format", DIVIDED)
def test_a_value_midway_between_codes_may_take_either(format: str) -> None:
    form, moved = get_format(format), []
    for units, shape, dtype in product(DIVISIONS, gpu_kernels.SHAPES, gpu_kernels.LIMITS):
        x = torch.randn(shape[:2], generator=torch.Generator().manual_seed(shape[1])).to(dtype)
        with GpuDivision(units):
            values = gpu_kernels.values_of(form.quantize(x), format)
        assert gpu_kernels.misplaced(values, x, format) == 0, (units, shape, dtype)
        moved.append(checks.relative(values, form.dequantize(form.quantize(x)).double()))
    # So much that a limit of errors would let mistakes pass.
    assert max(moved) > {"int8": 1e-3, "fp8": 4e-3, "fp8_group_128": 4e-3}.get(format, 2e-2)
    assert max(moved) < 2.5e-2


TARGETS = ["cpu:avx512_bf16", "cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "rocm:gfx942", "xpu:xe"]


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_kernel_makes_of_an_activation_is_read_back(target: str) -> None:
    x = torch.randn(2, 17, 640).to(torch.bfloat16)
    for kernel in gpu_kernels.kernels_on(Target.parse(target)):
        for format in {scheme.activation for scheme in gpu_kernels.schemes_of(kernel.method)}:
            with GpuDivision(None):
                found = tuple(kernel.quantize(x, format))
            if "weight_only" not in kernel.name:
                values = gpu_kernels.values_of(found, format)
                assert gpu_kernels.misplaced(values, x, format) == 0, (kernel.name, format)


def another_coarse(parts: Parts, run: int) -> Parts:
    coarse = parts[2].clone()
    coarse[:, run] *= 1.01
    return *parts[:2], coarse


def another_exponent(parts: Parts, block: int) -> Parts:
    """Halve a block's scale, as an amax just below a power of two would, and saturate."""
    values, scale = mxfp4.dequantize(parts[:2]), parts[1].clone()
    scale[:, block] -= 1
    steps = mx.scale_down(values.unflatten(-1, (-1, mx.BLOCK)), scale.int().unsqueeze(-1))
    even, odd = encode_e2m1(steps.flatten(-2)).unflatten(-1, (-1, 2)).unbind(-1)
    return pack_e2m1(even, odd), scale, parts[2]


def next_code(parts: Parts) -> Parts:
    codes = parts[0].clone()
    codes[:, 3] ^= 1
    return codes, *parts[1:]


MISTAKES: dict[str, Callable[[Parts], Parts]] = {
    "a run's coarse scale is off by 1 %": lambda parts: another_coarse(parts, 2),
    "a block's exponent is too low": lambda parts: another_exponent(parts, 7),
    "a code is the next one": next_code,
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("format", DIVIDED[3:])
def test_a_mistake_in_codes_is_found(format: str, mistake: str) -> None:
    x = torch.randn(33, 1040, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    parts = get_format(format).quantize(x)
    wrong = gpu_kernels.values_of(MISTAKES[mistake](tuple(parts)), format)
    assert gpu_kernels.misplaced(wrong, x, format) >= 16
    assert gpu_kernels.misplaced(gpu_kernels.values_of(tuple(parts), format), x, format) == 0


def test_values_that_were_not_quantized_are_found() -> None:
    x = torch.randn(5, 64)
    assert gpu_kernels.misplaced(x.double(), x, "int8") > 300
