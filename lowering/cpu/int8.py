"""int8 on CPU: s8 x s8 -> s32 GEMMs, with the scales and the bias left to Inductor.

Both kernels return the same integers. Inductor turns `quantize` into the tail of the loop that
produces its input, and the epilogue into one loop over the output.
"""

from __future__ import annotations

import torch

from omniq_compile.lowering.cpu import integer_matmul  # noqa: F401  (defines the operator)
from omniq_compile.lowering.formats import int8
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme

# |sum| <= K * 127 * 127 has to stay below 2**31.
MAX_K = (2**31 - 1) // 127**2


def _refuse(problem: Problem, scheme: Scheme) -> str | None:
    if problem.K > MAX_K:
        return f"K = {problem.K} can overflow an int32 sum (at most {MAX_K})"
    return None


def _quantize(x: torch.Tensor, format: str) -> Parts:
    return int8.quantize(x)


def _gemm_int_mm(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    if problem.b_rank > 2:
        sums = torch.ops.omniq.int8_matmul(a[0], b[0], True)
    elif problem.a_rank == 2:
        sums = torch._int_mm(a[0], b[0].t())
    else:
        rows = torch._int_mm(a[0].flatten(0, -2), b[0].t())
        sums = rows.unflatten(0, a[0].shape[:-1])
    return int8.epilogue(sums, a[1], b[1], bias, problem.dtype)


def _gemm_float32(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    sums = torch.ops.omniq.int8_matmul(a[0], b[0], False)
    return int8.epilogue(sums, a[1], b[1], bias, problem.dtype)


INT_MM = Kernel(
    name="cpu_s8_int_mm",
    method="int8",
    device="cpu",
    archs=("avx512_bf16", "avx512_vnni"),
    native=True,
    about="torch._int_mm (oneDNN s8 GEMM), epilogue by Inductor",
    quantize=_quantize,
    gemm=_gemm_int_mm,
    refuse=_refuse,
)

FLOAT32 = Kernel(
    name="cpu_s8_float32",
    method="int8",
    device="cpu",
    archs=("generic",),
    native=False,
    about="no VNNI: codes multiplied exactly by float32 GEMMs over short runs of K",
    quantize=_quantize,
    gemm=_gemm_float32,
    refuse=_refuse,
)
