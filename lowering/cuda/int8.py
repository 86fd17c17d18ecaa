"""int8 on NVIDIA GPUs through cuBLASLt."""

from __future__ import annotations

from omniq_compile.lowering import gpu_quantize, padded_int_mm
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme
from omniq_compile.lowering.target import ARCHITECTURES


def refuse(problem: Problem, scheme: Scheme) -> str | None:
    """Return why another kernel should or has to take a problem, or None."""
    if isinstance(problem.M, int) and problem.M < padded_int_mm.MIN_M:
        return f"M = {problem.M}, and torch._int_mm needs more than {padded_int_mm.MIN_M - 1}"
    return padded_int_mm.refuse(problem, scheme)


INT_MM = Kernel(
    name="cuda_s8_int_mm",
    method="int8",
    device="cuda",
    archs=ARCHITECTURES["cuda"],
    native=True,
    about="torch._int_mm (cuBLASLt s8 GEMM), epilogue by Inductor",
    quantize=gpu_quantize.quantize,
    gemm=padded_int_mm.gemm,
    refuse=refuse,
    takes_matrices=True,
)
