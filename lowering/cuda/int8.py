"""int8 on NVIDIA GPUs through cuBLASLt."""

from __future__ import annotations

from omniq_compile.lowering import int8_gemms
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme
from omniq_compile.lowering.target import ARCHITECTURES

# What `torch._int_mm` checks on CUDA (aten/src/ATen/native/cuda/Blas.cpp). Its fake does not, so
# a graph would compile and fail in its first call.
MIN_M = 17
ALIGNMENT = 8


def refuse_int_mm(problem: Problem, scheme: Scheme) -> str | None:
    """Return why ``torch._int_mm`` on a GPU cannot take a problem, or None."""
    if problem.b_rank > 2:
        return "torch._int_mm takes no batch of matrices"
    if not isinstance(problem.M, int):
        return f"M = {problem.M} is not known to be over {MIN_M - 1}, as torch._int_mm needs"
    if problem.M < MIN_M:
        return f"M = {problem.M}, and torch._int_mm needs more than {MIN_M - 1}"
    for name, size in (("K", problem.K), ("N", problem.N)):
        if not isinstance(size, int) or size % ALIGNMENT:
            return f"{name} = {size} is not a multiple of {ALIGNMENT}, as torch._int_mm needs"
    return int8_gemms.refuse(problem, scheme)


INT_MM = Kernel(
    name="cuda_s8_int_mm",
    method="int8",
    device="cuda",
    archs=ARCHITECTURES["cuda"],
    native=True,
    about="torch._int_mm (cuBLASLt s8 GEMM), epilogue by Inductor",
    quantize=int8_gemms.quantize,
    gemm=int8_gemms.gemm_int_mm,
    refuse=refuse_int_mm,
)
