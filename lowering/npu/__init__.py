"""Kernels of Ascend NPUs, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.npu import int8, mx
from omniq_compile.lowering.target import ARCHITECTURES

_ALL = ARCHITECTURES["npu"]


KERNELS = (
    int8.QUANT_MATMUL,
    mx.MXFP8,
    mx.MXFP4,
    mx.MXFP4_DUALSCALE,
    emulated.int8("npu", _ALL, "where npu_quant_matmul cannot take it"),
    *emulated.kernels("npu", ("ascend910b",), "Ascend 910B", bfloat16_archs=("ascend910b",)),
    *emulated.kernels(
        "npu",
        ("ascend950",),
        {
            "fp8": "npu_quant_matmul's e4m3 mode is not called",
            "mxfp8": "where npu_quant_matmul cannot take it",
            "mxfp4": "where npu_quant_matmul cannot take it",
            "mxfp4_dualscale": "where npu_dual_level_quant_matmul cannot take it",
        },
        bfloat16_archs=("ascend950",),
    ),
)
