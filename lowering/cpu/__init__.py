"""CPU kernels, in order of preference."""

from omniq_compile.lowering.cpu import decoded, decoded_bfloat16, int8

KERNELS = (int8.INT_MM, int8.FLOAT32, *decoded_bfloat16.KERNELS, *decoded.KERNELS)
