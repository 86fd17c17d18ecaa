"""The checks of `test_gpu.py`, in small on the CPU, so that they are known to run and to fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gpu_checks as checks
import gpu_kernels
import pytest
import torch

from omniq_compile.lowering.target import Target, detect

PLACE = checks.Place("cpu", compiler="eager", width=64, tokens=(16, 8))
QWEN = "QwenImageTransformer2DModel"


def test_a_whole_model_and_its_blocks() -> None:
    checks.whole(QWEN, "int8", PLACE)
    torch._dynamo.reset()
    checks.regional(QWEN, "fp8", PLACE)


def test_resolutions() -> None:
    checks.resolutions(QWEN, "int8", PLACE)


@pytest.mark.parametrize("method", ["int8", "mxfp4 W4A8"])
def test_rows(method: str) -> None:
    checks.rows(method, 257, 131, True, PLACE)


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
    (kernel,) = (k for k in KERNELS if k.name == "cpu_s8_float32")
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
