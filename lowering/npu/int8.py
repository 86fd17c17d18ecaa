"""int8 on Ascend NPUs, through torch_npu."""

from __future__ import annotations

import torch

from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.npu import (
    limits,
    operators,  # noqa: F401  (defines the operators)
)
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme
from omniq_compile.lowering.target import ARCHITECTURES


def quantize(x: torch.Tensor, format: str) -> Parts:
    """Return codes int8 ``[..., K]`` and a float32 scale per row ``[...]``."""
    parts = torch.ops.omniq.npu_dynamic_quant(x)
    return parts[0], parts[1]


def gemm(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Multiply, scale and add the bias in one operator; see `Kernel.gemm`."""
    out: torch.Tensor = torch.ops.omniq.npu_quant_matmul(*a, *b, bias, problem.dtype)
    return out


QUANT_MATMUL = Kernel(
    name="npu_s8_quant_matmul",
    method="int8",
    device="npu",
    archs=ARCHITECTURES["npu"],
    native=True,
    about="torch_npu: npu_dynamic_quant, npu_quant_matmul with scales and bias in its epilogue",
    quantize=quantize,
    gemm=gemm,
    refuse=limits.refuse,
)
