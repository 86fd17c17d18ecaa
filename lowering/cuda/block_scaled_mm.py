"""Block-wise fp8 through ``torch._scaled_mm``: cuBLASLt with a scale per 1 x 128 and 128 x 128.

On an H200 4096 x 12288 x 3072 takes it 246 us, and omniq's own Triton GEMM 361; their results were
the same, bit for bit (``docs/benchmarks/2026-11-26-nvidia-h200-tiles.md``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniq_compile.lowering import gpu_quantize, scaled_mm
from omniq_compile.lowering.formats import block_size
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme

# Rows and columns of a weight's block, and columns of an activation's group.
BLOCK = 128

# A weight's row of scales is padded to four (aten/src/ATen/native/cuda/ScaledBlas.cpp, in newer
# versions of `is_blockwise_128x128_scaling`), and with four of an activation's each column of them
# starts at 16 bytes: multiples of four need neither.
SCALES = 4

# The first CUDA whose cuBLASLt has these scales.
FIRST_CUDA = (12, 9)


@torch.library.custom_op("omniq::cuda_block_scaled_mm", mutates_args=())
def block_scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Multiply e4m3 codes with a scale per 1 x 128 of a and per 128 x 128 of b.

    Args:
        a: float8_e4m3fn ``[M, K]``.
        a_scale: float32 ``[K / 128, M]``, as cuBLASLt reads it.
        b: float8_e4m3fn ``[N, K]``, and b_scale float32 ``[N / 128, K / 128]``.

    Returns:
        bfloat16 ``[M, N]``.
    """
    return torch._scaled_mm(
        a, b.t(), a_scale.contiguous().t(), b_scale.contiguous().t(), out_dtype=torch.bfloat16
    )


@block_scaled_mm.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.bfloat16)


def refuse(problem: Problem, scheme: Scheme) -> str | None:
    """Return why cuBLASLt cannot take a problem, or None."""
    if (block_size(scheme.weight), block_size(scheme.activation)) != ((BLOCK, BLOCK), (1, BLOCK)):
        return f"cuBLASLt has scales per 1 x {BLOCK} and {BLOCK} x {BLOCK}, and this is {scheme}"
    if not problem.b_is_weight or problem.b_rank > 2:
        return "it takes one weight, and both operands are activations"
    for name, size, multiple in (
        ("M", problem.M, SCALES),
        ("N", problem.N, BLOCK),
        ("K", problem.K, SCALES * BLOCK),
    ):
        if not isinstance(size, int) or size % multiple:
            return f"{name} = {size} is not a multiple of {multiple}, as its scales need"
    if problem.dtype is not torch.bfloat16:
        result = str(problem.dtype).removeprefix("torch.")
        return f"the result is {result}; this recipe is used for bfloat16"
    return _refuse_cuda(torch.version.cuda)


def _refuse_cuda(version: str | None) -> str | None:
    if version is None or tuple(map(int, version.split(".")[:2])) >= FIRST_CUDA:
        return None
    return f"cuBLASLt of CUDA {version} has no scales per block; that of 12.9 is the first"


def gemm(a: Parts, b: Parts, bias: Tensor | None, problem: Problem, scheme: Scheme) -> Tensor:
    """Multiply; see `Kernel.gemm`. The bias is added to what was rounded to bfloat16."""
    codes, scale = (scaled_mm.as_matrix(part, 1) for part in a)
    out = torch.ops.omniq.cuda_block_scaled_mm(codes, scale.t().contiguous(), *b)
    if bias is not None:
        out = (out.to(torch.float32) + bias).to(torch.bfloat16)
    return scaled_mm.restore(out, a[0], problem)


BLOCK_SCALED_MM = Kernel(
    name="cuda_fp8_block_scaled_mm",
    method="fp8",
    device="cuda",
    archs=("sm_90",),
    native=True,
    about="torch._scaled_mm (cuBLASLt), a scale per 1 x 128 and per 128 x 128; bias by Inductor",
    quantize=gpu_quantize.quantize,
    gemm=gemm,
    refuse=refuse,
    takes_matrices=True,
)
