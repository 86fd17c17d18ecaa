"""CPU kernels, in order of preference."""

from omniq_compile.lowering.cpu.int8 import FLOAT32, INT_MM

KERNELS = (INT_MM, FLOAT32)
