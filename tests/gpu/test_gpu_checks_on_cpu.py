"""The checks of `test_gpu.py`, in small on the CPU, so that they are known to run and to fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gpu_checks as checks
import gpu_kernels
import pytest
import torch

from omniq_compile.lowering.target import detect

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


@pytest.mark.parametrize("kernel", KERNELS[:2], ids=lambda kernel: kernel.name)
def test_a_kernel_that_is_off_by_a_little_is_found(kernel: gpu_kernels.Kernel) -> None:
    def gemm(*args: object) -> torch.Tensor:
        return kernel.gemm(*args) * 1.01  # type: ignore[arg-type]

    with pytest.raises(AssertionError, match=kernel.name):
        gpu_kernels.check_kernel(
            dataclasses.replace(kernel, gemm=gemm), "cpu", "eager", [(17, 257, 48)]
        )
