"""Kernels of AMD GPUs, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.rocm import aiter, fp8, int8, mx, triton
from omniq_compile.lowering.target import ARCHITECTURES

_ALL = ARCHITECTURES["rocm"]

# Why the last rows are emulated: what the others cannot take, and what has no other row at all.
_LEFT = {method: f"where no kernel for {method} can take it" for method in emulated.ELEMENTS}
_NO_SCALES = dict.fromkeys(("mxfp8", "mxfp4", "mxfp4_dualscale"), triton.NO_SCALES)

KERNELS = (
    *triton.INT8,
    int8.INT_MM,
    fp8.SCALED_MM,
    fp8.SCALED_MM_FNUZ,
    *triton.FP8,
    aiter.GEMM_A4W4,
    mx.MXFP8,
    mx.MXFP4,
    *triton.MX,
    *triton.DECODED,
    emulated.int8("rocm", _ALL, "where no integer GEMM can take it"),
    *emulated.kernels("rocm", ("gfx950",), _LEFT, bfloat16_archs=("gfx950",)),
    *emulated.kernels("rocm", triton.UNSCALED, _LEFT | _NO_SCALES, bfloat16_archs=triton.UNSCALED),
)
