"""Kernels of AMD GPUs, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.rocm import aiter, fp8, int8, mx
from omniq_compile.lowering.target import ARCHITECTURES

_ALL = ARCHITECTURES["rocm"]
_FP8 = "where torch._scaled_mm cannot take it"

KERNELS = (
    int8.INT_MM,
    fp8.SCALED_MM,
    fp8.SCALED_MM_FNUZ,
    aiter.GEMM_A4W4,
    mx.MXFP8,
    mx.MXFP4,
    emulated.int8("rocm", _ALL, "where torch._int_mm cannot take it"),
    *emulated.kernels(
        "rocm",
        ("gfx950",),
        {
            "fp8": _FP8,
            "mxfp8": "where torch._scaled_mm cannot take it",
            "mxfp4": "where neither AITER nor torch._scaled_mm can take it",
            "mxfp4_dualscale": "no GEMM of AITER or torch takes a second level of scales",
        },
        bfloat16_archs=("gfx950",),
    ),
    *emulated.kernels(
        "rocm",
        ("gfx942",),
        {
            "fp8": _FP8,
            "mxfp8": "gfx942 has no block scales in its matrix instructions",
            "mxfp4": "no e2m1 arithmetic on gfx942",
            "mxfp4_dualscale": "no e2m1 arithmetic on gfx942",
        },
        bfloat16_archs=("gfx942",),
    ),
)
