"""int8 on CPUs: with VNNI or AMX, and without."""

from __future__ import annotations

from dataclasses import replace

from omniq_compile.lowering import emulated, int8_gemms
from omniq_compile.lowering.cpu import quantize
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
    start=quantize.start,
)

FLOAT32 = replace(emulated.int8("cpu", ("generic",), "no VNNI"), start=quantize.start)
