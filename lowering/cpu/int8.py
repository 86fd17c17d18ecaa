"""int8 on CPUs with VNNI or AMX."""

from __future__ import annotations

from omniq_compile.lowering import int8_gemms
from omniq_compile.lowering.registry import Kernel

INT_MM = Kernel(
    name="cpu_s8_int_mm",
    method="int8",
    device="cpu",
    archs=("avx512_bf16", "avx512_vnni"),
    native=True,
    about="torch._int_mm (oneDNN s8 GEMM), epilogue by Inductor",
    quantize=int8_gemms.quantize,
    gemm=int8_gemms.gemm_recycled,
    refuse=int8_gemms.refuse,
)
