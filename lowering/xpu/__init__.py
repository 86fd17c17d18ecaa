"""Kernels of Intel GPUs, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.target import ARCHITECTURES

_ALL = ARCHITECTURES["xpu"]

KERNELS = (
    emulated.int8("xpu", _ALL, "no integer GEMM takes it"),
    *emulated.kernels("xpu", _ALL, "this path", bfloat16_archs=_ALL),
)
