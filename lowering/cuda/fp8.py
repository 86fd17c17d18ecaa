"""fp8 and mxfp8 on NVIDIA GPUs through cuBLASLt and CUTLASS."""

from __future__ import annotations

from omniq_compile.lowering import gpu_quantize, scaled_mm
from omniq_compile.lowering.registry import Kernel

SCALED_MM = Kernel(
    name="cuda_fp8_scaled_mm",
    method="fp8",
    device="cuda",
    archs=("sm_120", "sm_100", "sm_90", "sm_89"),
    native=True,
    about="torch._scaled_mm, a scale per row of both, scales and bias in its epilogue",
    quantize=gpu_quantize.quantize,
    gemm=scaled_mm.gemm_rows,
    refuse=scaled_mm.refuse_rows,
    takes_matrices=True,
)

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
