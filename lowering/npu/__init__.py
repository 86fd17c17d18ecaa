"""Kernels of Ascend NPUs, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.target import ARCHITECTURES

_ALL = ARCHITECTURES["npu"]

KERNELS = (
    emulated.int8("npu", _ALL, "no integer GEMM takes it"),
    *emulated.kernels("npu", _ALL, "this path", bfloat16_archs=_ALL),
)
