"""Kernels of NVIDIA GPUs, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.cuda import fp8, int8
from omniq_compile.lowering.target import ARCHITECTURES

_ALL = ARCHITECTURES["cuda"]

KERNELS = (
    int8.INT_MM,
    fp8.SCALED_MM,
    fp8.SCALED_MM_BLOCKS,
    emulated.int8("cuda", _ALL, "torch._int_mm cannot take it"),
    *emulated.kernels("cuda", _ALL, "this path", bfloat16_archs=_ALL),
)
