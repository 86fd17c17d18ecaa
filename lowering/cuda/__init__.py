"""Kernels of NVIDIA GPUs, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.cuda import block_scaled_mm, fp8, int8, triton
from omniq_compile.lowering.target import ARCHITECTURES

_ALL = ARCHITECTURES["cuda"]

_UNSCALED = triton.BEFORE_BLACKWELL
_SCALED = tuple(arch for arch in _ALL if arch not in _UNSCALED)

# Why the last rows are emulated: what the others cannot take, and what has no other row at all.
_LEFT = {method: f"where no kernel for {method} can take it" for method in emulated.ELEMENTS}
_NO_SCALES = dict.fromkeys(("mxfp8", "mxfp4", "mxfp4_dualscale"), triton.NO_SCALES)

KERNELS = (
    *triton.INT8,
    int8.INT_MM,
    triton.INT8_SM_100,
    triton.FP8_ONE_WAVE,
    fp8.SCALED_MM,
    fp8.SCALED_MM_SM_89,
    block_scaled_mm.BLOCK_SCALED_MM,
    *triton.FP8,
    fp8.SCALED_MM_BLOCKS,
    *triton.MX,
    *triton.DECODED,
    emulated.int8("cuda", _ALL, "where no integer GEMM can take it"),
    *emulated.kernels("cuda", _SCALED, _LEFT, bfloat16_archs=_SCALED),
    *emulated.kernels("cuda", _UNSCALED, _LEFT | _NO_SCALES, bfloat16_archs=_UNSCALED),
)
