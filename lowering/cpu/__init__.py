"""CPU kernels, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.cpu import int8
from omniq_compile.lowering.target import ARCHITECTURES

KERNELS = (
    int8.INT_MM,
    emulated.int8("cpu", ("generic",), "no VNNI"),
    *emulated.kernels("cpu", ARCHITECTURES["cpu"], "CPUs", bfloat16_archs=("avx512_bf16",)),
)
