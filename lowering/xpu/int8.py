"""int8 on Intel GPUs through oneDNN."""

from __future__ import annotations

from omniq_compile.lowering import gpu_quantize, int8_gemms
from omniq_compile.lowering.registry import Kernel

# ``_int_mm_xpu`` checks that both are int8 matrices that fit, and asks for no alignment
# (aten/src/ATen/native/mkldnn/xpu/Blas.cpp).
INT_MM = Kernel(
    name="xpu_s8_int_mm",
    method="int8",
    device="xpu",
    archs=("xe",),
    native=True,
    about="torch._int_mm (oneDNN s8 GEMM), epilogue by Inductor",
    quantize=gpu_quantize.quantize,
    gemm=int8_gemms.gemm_int_mm,
    refuse=int8_gemms.refuse,
    takes_matrices=True,
)
