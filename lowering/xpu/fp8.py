"""fp8 on Intel GPUs through oneDNN."""

from __future__ import annotations

from functools import partial

from omniq_compile.lowering import gpu_quantize, scaled_mm
from omniq_compile.lowering.registry import Kernel

SCALED_MM = Kernel(
    name="xpu_fp8_scaled_mm",
    method="fp8",
    device="xpu",
    archs=("xe",),
    native=True,
    about="torch._scaled_mm (oneDNN), a scale per row of both, scales and bias in its epilogue",
    quantize=gpu_quantize.quantize,
    # XPU warns of fast accumulation in each call, and has none.
    gemm=partial(scaled_mm.gemm_rows, fast_accum=False),
    refuse=scaled_mm.refuse_rows,
    takes_matrices=True,
)
