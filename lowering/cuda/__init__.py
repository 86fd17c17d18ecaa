"""Kernels of NVIDIA GPUs, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.cuda import fp8, int8, triton
from omniq_compile.lowering.target import ARCHITECTURES

_ALL = ARCHITECTURES["cuda"]

KERNELS = (
    triton.INT8,
    int8.INT_MM,
    triton.INT8_LEGACY,
    fp8.SCALED_MM,
    triton.FP8,
    triton.FP8_BLOCKS,
    triton.FP8_WEIGHT_ONLY,
    fp8.SCALED_MM_BLOCKS,
    *triton.MX,
    *triton.DECODED,
    emulated.int8("cuda", _ALL, "where no integer GEMM can take it"),
    *emulated.kernels(
        "cuda",
        _ALL,
        {method: f"where no kernel for {method} can take it" for method in emulated.ELEMENTS},
        bfloat16_archs=_ALL,
    ),
)
