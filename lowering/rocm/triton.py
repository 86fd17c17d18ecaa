"""omniq's own kernels on AMD GPUs, see `triton_kernels`.

Their int8 row stands first: hipBLASLt's int8 GEMM, which `torch._int_mm` calls, is reported slower
than its BF16 one on MI300X.
"""

from __future__ import annotations

from omniq_compile.lowering.target import ARCHITECTURES
from omniq_compile.lowering.triton_kernels import decoded_rows, rows

INT8 = rows.int8("rocm", ARCHITECTURES["rocm"], "v_mfma_i32")

FP8 = (
    rows.fp8("rocm", ("gfx950",), "v_mfma_f32_*_f8f6f4"),
    rows.fp8("rocm", ("gfx942",), "v_mfma_f32_*_fp8, codes read as fnuz", fnuz=True),
    rows.fp8_blocks("rocm", ("gfx950",), "v_mfma_f32_*_f8f6f4"),
    rows.fp8_blocks("rocm", ("gfx942",), "v_mfma_f32_*_fp8, codes read as fnuz", fnuz=True),
)

MX = tuple(
    rows.mx("rocm", ("gfx950",), method, "v_mfma_scale")
    for method in ("mxfp8", "mxfp4", "mxfp4_dualscale")
)

# Triton 3.6 and 3.7 fail to compile dot_scaled for gfx942, which has no such instruction.
_NO_SCALES = "no block-scaled arithmetic before gfx950"
DECODED = (
    decoded_rows.mx_row("rocm", ("gfx942",), "mxfp8", _NO_SCALES),
    decoded_rows.mx_row("rocm", ("gfx942",), "mxfp4", _NO_SCALES),
    decoded_rows.dualscale_row("rocm", ("gfx942",), _NO_SCALES),
)

KERNELS = (INT8, *FP8, *MX, *DECODED)
