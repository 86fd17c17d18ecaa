"""Kernels of Intel GPUs, in order of preference."""

from omniq_compile.lowering import emulated
from omniq_compile.lowering.target import ARCHITECTURES
from omniq_compile.lowering.xpu import fp8, int8

_ALL = ARCHITECTURES["xpu"]

# Later ones take them, and e2m1 with them (github.com/pytorch/pytorch/pull/181727).
_NO_E8M0 = "before torch 2.14 torch._scaled_mm takes no e8m0 scales on XPU"

KERNELS = (
    int8.INT_MM,
    fp8.SCALED_MM,
    emulated.int8("xpu", _ALL, "where torch._int_mm cannot take it"),
    *emulated.kernels(
        "xpu",
        _ALL,
        {
            "fp8": "where torch._scaled_mm cannot take it",
            # Its fake asks for NVIDIA's swizzle there, and its kernel for none.
            "mxfp8": _NO_E8M0,
            "mxfp4": _NO_E8M0,
            "mxfp4_dualscale": "torch._scaled_mm takes no second scale beside e8m0 on XPU",
        },
        bfloat16_archs=_ALL,
    ),
)
