"""The MX formats on Ascend 950, through torch_npu."""

from __future__ import annotations

import torch

from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.npu import (
    limits,
    operators,  # noqa: F401  (defines the operators)
)
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme

# A2 and A3 (ascend910b) have neither the arithmetic nor the operators.
_ARCHS = ("ascend950",)


def quantize(x: torch.Tensor, format: str) -> Parts:
    """Return an activation's codes and e8m0 scales; see `operators.npu_dynamic_mx_quant`."""
    parts = torch.ops.omniq.npu_dynamic_mx_quant(x, format)
    return parts[0], parts[1]


def gemm(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Multiply codes with their scales and add the bias in one operator; see `Kernel.gemm`."""
    out: torch.Tensor = torch.ops.omniq.npu_mx_quant_matmul(*a, *b, bias, problem.dtype)
    return out


def quantize_dual_level(x: torch.Tensor, format: str) -> Parts:
    """Return an activation's codes, e8m0 scales and coarse scales.

    The operator knows no ``scale_alg``: the UOS format is quantized by its own definition, in
    operations of the graph.
    """
    if format != "mxfp4_dualscale":
        return get_format(format).quantize(x)
    parts = torch.ops.omniq.npu_dynamic_dual_level_mx_quant(x)
    return parts[0], parts[1], parts[2]


def arrange_dual_level(parts: Parts) -> Parts:
    """Lay a second matrix out as `operators.npu_dual_level_quant_matmul` reads it."""
    codes, scale, coarse = parts
    codes, coarse = torch.ops.omniq.npu_dual_level_arrange(codes, coarse)
    return codes, scale, coarse


def gemm_dual_level(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Multiply codes with both levels of scales and add the bias; see `Kernel.gemm`."""
    b = b if problem.b_is_weight else arrange_dual_level(b)
    out: torch.Tensor = torch.ops.omniq.npu_dual_level_quant_matmul(*a, *b, bias, problem.dtype)
    return out


MXFP8 = Kernel(
    name="npu_mxfp8_quant_matmul",
    method="mxfp8",
    device="npu",
    archs=_ARCHS,
    native=True,
    about="torch_npu: npu_dynamic_mx_quant, npu_quant_matmul with bias in its epilogue",
    quantize=quantize,
    gemm=gemm,
    refuse=limits.refuse,
)

MXFP4 = Kernel(
    name="npu_mxfp4_quant_matmul",
    method="mxfp4",
    device="npu",
    archs=_ARCHS,
    native=True,
    about="torch_npu: npu_dynamic_mx_quant, npu_quant_matmul of e2m1 with e2m1 or e4m3, bias in "
    "its epilogue",
    quantize=quantize,
    gemm=gemm,
    refuse=limits.refuse_e2m1,
)

MXFP4_DUALSCALE = Kernel(
    name="npu_mxfp4_dual_level_quant_matmul",
    method="mxfp4_dualscale",
    device="npu",
    archs=_ARCHS,
    native=True,
    about="torch_npu: npu_dual_level_quant_matmul, bias in its epilogue; the weight's codes are "
    "copied to FRACTAL_NZ once, or in each call where they are stored",
    quantize=quantize_dual_level,
    gemm=gemm_dual_level,
    arrange=arrange_dual_level,
    refuse=limits.refuse,
)
