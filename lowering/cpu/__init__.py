"""CPU kernels, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.cpu import decoded, int8
from omniq_compile.lowering.target import ARCHITECTURES

KERNELS = (
    int8.INT_MM,
    int8.FLOAT32,
    *decoded.KERNELS,
    *emulated.kernels("cpu", ARCHITECTURES["cpu"], "CPUs"),
)
