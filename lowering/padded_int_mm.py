"""``omniq::padded_int_mm``: `torch._int_mm` of GPUs, for any number of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omniq_compile.lowering import int8_gemms
from omniq_compile.lowering.formats import int8
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import Scheme

# What `torch._int_mm` checks on GPUs (aten/src/ATen/native/cuda/Blas.cpp). Its fake does not, so a
# graph would compile and fail in its first call.
MIN_M = 17
ALIGNMENT = 8


@torch.library.custom_op("omniq::padded_int_mm", mutates_args=())
def padded_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.t()`` as int32: fewer than 17 rows are padded with zeros.

    Args:
        a: int8 ``[..., K]``.
        b: int8 ``[N, K]``.
    """
    rows = a.reshape(-1, a.shape[-1])
    missing = MIN_M - rows.shape[0]
    padded = F.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows.contiguous()
    out = torch._int_mm(padded, b.t())
    return out[: rows.shape[0]].view(*a.shape[:-1], b.shape[0])


@padded_int_mm.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=torch.int32)


def gemm(a: Parts, b: Parts, bias: Tensor | None, problem: Problem, scheme: Scheme) -> Tensor:
    """Multiply with `torch._int_mm`, as a node of its own where M is known to be enough."""
    if isinstance(problem.M, int) and problem.M >= MIN_M:
        return int8_gemms.gemm_int_mm(a, b, bias, problem, scheme)
    sums = torch.ops.omniq.padded_int_mm(a[0], b[0])
    return int8.epilogue(sums, a[1], b[1], bias, problem.dtype)


def refuse(problem: Problem, scheme: Scheme) -> str | None:
    """Return why ``torch._int_mm`` on a GPU cannot take a problem, or None."""
    if problem.b_rank > 2:
        return "torch._int_mm takes no batch of matrices"
    for name, size in (("K", problem.K), ("N", problem.N)):
        if not isinstance(size, int) or size % ALIGNMENT:
            return f"{name} = {size} is not a multiple of {ALIGNMENT}, as torch._int_mm needs"
    return int8_gemms.refuse(problem, scheme)
