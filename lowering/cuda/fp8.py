"""fp8 and mxfp8 on NVIDIA GPUs through cuBLASLt and CUTLASS."""

from __future__ import annotations

import dataclasses

import torch

from omniq_compile.lowering import gpu_quantize, scaled_mm
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme

SCALED_MM = Kernel(
    name="cuda_fp8_scaled_mm",
    method="fp8",
    device="cuda",
    archs=("sm_120", "sm_100", "sm_90"),
    native=True,
    about="torch._scaled_mm, a scale per row of both, scales and bias in its epilogue",
    quantize=gpu_quantize.quantize,
    gemm=scaled_mm.gemm_rows,
    refuse=scaled_mm.refuse_rows,
    takes_matrices=True,
)


def _refuse_sm_89(problem: Problem, scheme: Scheme) -> str | None:
    """Return why sm_89 cannot take a problem, or None.

    Its kernel is CUTLASS's Stream-K, whose blocks wait for counters in memory. torch 2.11 clears
    them on the default stream, whichever runs the kernel (pytorch/pytorch#177651).
    """
    refusal = scaled_mm.refuse_rows(problem, scheme)
    if refusal is None and torch.__version__ < "2.12":
        return "before torch 2.12 it may wait forever on any stream but the default one"
    return refusal


SCALED_MM_SM_89 = dataclasses.replace(SCALED_MM, archs=("sm_89",), refuse=_refuse_sm_89)

SCALED_MM_BLOCKS = Kernel(
    name="cuda_mxfp8_scaled_mm",
    method="mxfp8",
    device="cuda",
    archs=("sm_120", "sm_100"),
    native=True,
    about="torch._scaled_mm (cuBLASLt mxf8f6f4), an e8m0 scale per 1 x 32, bias in its epilogue; "
    "the weight's scales are swizzled once",
    quantize=gpu_quantize.quantize,
    gemm=scaled_mm.gemm_blocks,
    refuse=scaled_mm.refuse_blocks,
    arrange=scaled_mm.arrange_blocks,
    takes_matrices=True,
)
