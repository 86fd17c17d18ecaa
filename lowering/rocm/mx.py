"""mxfp8 and mxfp4 on gfx950 through hipBLASLt, the 1 x 32 recipe of ``torch._scaled_mm``.

Scales are not swizzled as on NVIDIA's GPUs, but the recipe is told by their number: rows are padded
to 128. Limits are those of aten/src/ATen/native/cuda/ScaledBlas.cpp (ROCm 7.0 to 7.12). A bias is
added afterwards, because hipBLASLt's MX GEMMs take none (rocRoller: "does not support bias").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omniq_compile.lowering import gpu_quantize
from omniq_compile.lowering.formats import mx
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme

ALIGNMENT_MN = 16
ALIGNMENT_K = 128
SCALE_ROWS = 128
DTYPES = (torch.bfloat16, torch.float16)

# The first ROCm with which newer versions of ScaledBlas.cpp take scales for swizzled
# ("BlockWiseBlk32Ue8m0_32_8_EXT"). Of whole tiles there are as many as of those that are not:
# nothing would be refused, and the product wrong.
SWIZZLED_ROCM = (7, 13)


@torch.library.custom_op("omniq::rocm_scaled_mm_1x32", mutates_args=())
def rocm_scaled_mm_1x32(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Multiply MX codes, each block with its e8m0 scale; M is padded to a multiple of 16.

    An operator of its own, because Inductor has no e2m1 dtype to make the call with.

    Args:
        a: e4m3 ``[..., M, K]`` or packed e2m1 (uint8) ``[..., M, K / 2]``.
        a_scale: uint8 e8m0 ``[..., M, K / 32]``.
        b, b_scale: the same of ``[N, K]``, and the same element.
        dtype: of the result ``[..., M, N]``, bfloat16 or float16.
    """
    rows = a.reshape(-1, a.shape[-1])
    padded = _padded(rows.view(torch.uint8), ALIGNMENT_MN)
    element = torch.float4_e2m1fn_x2 if a.dtype is torch.uint8 else a.dtype
    out = torch._scaled_mm(
        padded.view(element),
        b.view(element).t(),
        _scales(a_scale.reshape(-1, a_scale.shape[-1])),
        _scales(b_scale),
        out_dtype=dtype,
    )
    return out[: rows.shape[0]].view(*a.shape[:-1], b.shape[0])


@rocm_scaled_mm_1x32.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)


def _padded(rows: Tensor, multiple: int) -> Tensor:
    missing = -rows.shape[0] % multiple
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()


def _scales(scale: Tensor) -> Tensor:
    return _padded(scale, SCALE_ROWS).view(torch.float8_e8m0fnu)


def gemm(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Multiply MX codes with their scales; see `Kernel.gemm`."""
    out: torch.Tensor = torch.ops.omniq.rocm_scaled_mm_1x32(*a, *b, problem.dtype)
    return add_bias(out, bias)


def add_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias ``[N]`` to a result that is rounded already, in float32."""
    if bias is None:
        return out
    return (out.to(torch.float32) + bias.to(torch.float32)).to(out.dtype)


def refuse(problem: Problem, scheme: Scheme) -> str | None:
    """Return why the 1 x 32 recipe cannot take a problem, or None."""
    if problem.b_is_weight and scheme.activation != scheme.weight:
        return f"hipBLASLt's MX GEMMs take one element type, not {scheme}"
    if problem.b_rank > 2:
        return "torch._scaled_mm takes no batch of matrices"
    if not isinstance(problem.K, int) or mx.padded(problem.K) % ALIGNMENT_K:
        return f"K = {problem.K} in blocks of 32 is not a multiple of {ALIGNMENT_K}"
    if not isinstance(problem.N, int) or problem.N % ALIGNMENT_MN:
        return f"N = {problem.N} is not a multiple of {ALIGNMENT_MN}"
    if problem.dtype not in DTYPES:
        return f"the result is {str(problem.dtype).removeprefix('torch.')}, not one of 16 bits"
    version = torch.version.rocm or torch.version.hip
    if version and tuple(map(int, version.split(".")[:2])) >= SWIZZLED_ROCM:
        return f"torch._scaled_mm takes swizzled scales with ROCm {version}"
    return None


def _scaled_mm(method: str, element: str) -> Kernel:
    return Kernel(
        name=f"rocm_{method}_scaled_mm",
        method=method,
        device="rocm",
        archs=("gfx950",),
        native=True,
        about=f"torch._scaled_mm (hipBLASLt) of {element}, a scale per 1 x 32; bias added after",
        quantize=gpu_quantize.quantize,
        gemm=gemm,
        refuse=refuse,
    )


MXFP8 = _scaled_mm("mxfp8", "e4m3")
MXFP4 = _scaled_mm("mxfp4", "e2m1")
