"""int8 on AMD GPUs through hipBLASLt."""

from __future__ import annotations

from omniq_compile.lowering import gpu_quantize, padded_int_mm
from omniq_compile.lowering.registry import Kernel

INT_MM = Kernel(
    name="rocm_s8_int_mm",
    method="int8",
    device="rocm",
    archs=("gfx950", "gfx942"),
    native=True,
    about="torch._int_mm (hipBLASLt s8 GEMM; reported slower than BF16 on MI300X), epilogue by "
    "Inductor",
    quantize=gpu_quantize.quantize,
    gemm=padded_int_mm.gemm,
    refuse=padded_int_mm.refuse,
    takes_matrices=True,
)
