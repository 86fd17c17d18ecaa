"""int8 through plain torch: s8 x s8 -> s32 GEMMs, with the scales and the bias left to Inductor.

Both GEMMs return the same integers. Inductor turns `quantize` into the tail of the loop that
produces its input, and the epilogue into one loop over the output.
"""

from __future__ import annotations

import torch

from omniq_compile.lowering import integer_matmul  # noqa: F401  (defines the operator)
from omniq_compile.lowering.formats import int8
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import Scheme

# |sum| <= K * 127 * 127 has to stay below 2**31.
MAX_K = (2**31 - 1) // 127**2


def refuse(problem: Problem, scheme: Scheme) -> str | None:
    """Return why an int32 sum could overflow, or None."""
    if problem.K > MAX_K:
        return f"K = {problem.K} can overflow an int32 sum (at most {MAX_K})"
    return None


def quantize(x: torch.Tensor, format: str) -> Parts:
    """Return codes int8 ``[..., K]`` and a float32 scale per row ``[...]``."""
    return int8.quantize(x)


def gemm_int_mm(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Multiply with `torch._int_mm`; see `Kernel.gemm`."""
    if problem.b_rank > 2 or problem.K == 1:
        sums = torch.ops.omniq.int8_matmul(a[0], b[0], True)
    elif problem.a_rank == 2:
        sums = torch._int_mm(a[0], b[0].t())
    else:
        rows = torch._int_mm(a[0].flatten(0, -2), b[0].t())
        sums = rows.unflatten(0, a[0].shape[:-1])
    return int8.epilogue(sums, a[1], b[1], bias, problem.dtype)


def gemm_recycled(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Multiply with `torch._int_mm` on a CPU, into memory used again; see `Kernel.gemm`."""
    return _int8_matmul(a, b, bias, problem.dtype, use_int_mm=True)


def gemm_float32(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Multiply exactly through float32; see `Kernel.gemm`."""
    return _int8_matmul(a, b, bias, problem.dtype, use_int_mm=False)


def _int8_matmul(
    a: Parts, b: Parts, bias: torch.Tensor | None, dtype: torch.dtype, use_int_mm: bool
) -> torch.Tensor:
    sums = torch.ops.omniq.int8_matmul(a[0], b[0], use_int_mm)
    return int8.epilogue(sums, a[1], b[1], bias, dtype)
