"""omniq's own kernels on AMD GPUs, see `triton_kernels`.

Their int8 row stands first: hipBLASLt's int8 GEMM, which `torch._int_mm` calls, is reported slower
than its BF16 one on MI300X.
"""

from __future__ import annotations

from omniq_compile.lowering.triton_kernels import decoded_rows, rows

INT8 = (
    rows.int8("rocm", ("gfx950", "gfx942", "gfx90a"), "v_mfma_i32"),
    rows.int8("rocm", ("gfx1201", "gfx1100"), "v_wmma_i32"),
)

_FP8 = (
    (("gfx950",), "v_mfma_f32_*_f8f6f4", False),
    (("gfx942",), "v_mfma_f32_*_fp8, codes read as fnuz", True),
    (("gfx1201",), "v_wmma_f32_*_fp8", False),
)
FP8 = (
    *(rows.fp8("rocm", archs, how, fnuz) for archs, how, fnuz in _FP8),
    *(rows.fp8_blocks("rocm", archs, how, fnuz) for archs, how, fnuz in _FP8),
    decoded_rows.fp8_weight_only_row(
        "rocm", ("gfx1100", "gfx90a"), "no e4m3 before gfx942 and gfx1201"
    ),
)

MX = tuple(
    rows.mx("rocm", ("gfx950",), method, "v_mfma_scale")
    for method in ("mxfp8", "mxfp4", "mxfp4_dualscale")
)

# Triton 3.6 and 3.7 fail to compile dot_scaled for gfx942, which has no such instruction.
UNSCALED = ("gfx942", "gfx1201", "gfx1100", "gfx90a")
NO_SCALES = "no block-scaled arithmetic but on gfx950"
DECODED = (
    decoded_rows.mx_row("rocm", UNSCALED, "mxfp8", NO_SCALES),
    decoded_rows.mx_row("rocm", UNSCALED, "mxfp4", NO_SCALES),
    decoded_rows.dualscale_row("rocm", UNSCALED, NO_SCALES),
)
