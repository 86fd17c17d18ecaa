"""Rows that multiply natively, on each architecture that they name."""

from __future__ import annotations

from pathlib import Path

import fake_gemms
import pytest
import torch

from omniq_compile.lowering import registry
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import get_scheme
from omniq_compile.lowering.target import Target

BF16 = torch.bfloat16


def native_rows(device: str) -> list[Kernel]:
    return [kernel for kernel in registry.kernels_of(device) if kernel.native]


CALLS = [
    (Target(device, arch), kernel)
    for device in ("rocm", "xpu")
    for kernel in native_rows(device)
    if "triton" not in kernel.name
    for arch in kernel.archs
]


@pytest.mark.parametrize(("target", "kernel"), CALLS, ids=lambda x: getattr(x, "name", str(x)))
def test_a_row_calls_what_the_architecture_has_by_its_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: Target, kernel: Kernel
) -> None:
    recorders = (
        fake_gemms.install_torch(monkeypatch, target.arch),
        fake_gemms.install_aiter(monkeypatch, tmp_path, target.arch),
    )
    scheme, problem = get_scheme(kernel.method), Problem(64, 512, 128, 2, 2, BF16)
    x, w = torch.randn(64, 512, dtype=BF16), torch.randn(128, 512, dtype=BF16)
    assert kernel.refuse(problem, scheme) is None
    weight = kernel.arrange(get_format(scheme.weight).quantize(w))
    kernel.gemm(kernel.quantize(x, scheme.activation), weight, None, problem, scheme)
    assert any(recorder.calls for recorder in recorders)


# The first compute capability with the arithmetic: PTX ISA, ``mma`` of .s8 and of .e4m3, and
# ``mma.block_scale`` and ``tcgen05.mma`` with scales.
FIRST = {"int8": 80, "fp8": 89, "mxfp8": 100, "mxfp4": 100, "mxfp4_dualscale": 100}


@pytest.mark.parametrize("kernel", native_rows("cuda"), ids=lambda kernel: kernel.name)
def test_no_row_is_offered_before_nvidia_had_the_arithmetic(kernel: Kernel) -> None:
    assert min(int(arch.removeprefix("sm_")) for arch in kernel.archs) >= FIRST[kernel.method]
