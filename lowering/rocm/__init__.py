"""Kernels of AMD GPUs, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.rocm import triton
from omniq_compile.lowering.target import ARCHITECTURES

_ALL = ARCHITECTURES["rocm"]

KERNELS = (
    *triton.KERNELS,
    emulated.int8("rocm", _ALL, "no integer GEMM takes it"),
    *emulated.kernels("rocm", _ALL, "this path", bfloat16_archs=_ALL),
)
