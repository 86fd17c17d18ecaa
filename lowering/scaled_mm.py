"""GEMMs through ``torch._scaled_mm``, the first version of it.

The second, ``torch.nn.functional.scaled_mm``, is the public one, but Inductor 2.13 asserts on its
swizzled scales and binds its block-scaled recipes to the first version's layouts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import Scheme

# K and N of `torch._scaled_mm`, checked by its fake kernel on CUDA and XPU.
ALIGNMENT = 16

# Rows and columns of a tile of block scales as cuBLAS reads them.
TILE_ROWS, TILE_COLUMNS = 128, 4


def refuse_rows(problem: Problem, scheme: Scheme) -> str | None:
    """Return why the row-wise recipe cannot take a problem, or None."""
    if scheme.weight != "fp8":
        return f"torch._scaled_mm takes a scale per row, and {scheme.weight} has one per block"
    return _refuse_shape(problem)


def _refuse_shape(problem: Problem) -> str | None:
    if problem.b_rank > 2:
        return "torch._scaled_mm takes no batch of matrices"
    for name, size in (("K", problem.K), ("N", problem.N)):
        if not isinstance(size, int) or size % ALIGNMENT:
            return f"{name} = {size} is not a multiple of {ALIGNMENT}, as torch._scaled_mm needs"
    if problem.dtype is not torch.bfloat16:
        result = str(problem.dtype).removeprefix("torch.")
        return f"the result is {result}; the row- and block-wise recipes are used for bfloat16"
    return None


def gemm_rows(
    a: Parts,
    b: Parts,
    bias: torch.Tensor | None,
    problem: Problem,
    scheme: Scheme,
    fast_accum: bool = True,
) -> torch.Tensor:
    """Multiply fp8 codes with a scale per row of both; see `Kernel.gemm`.

    Fast accumulation keeps about 14 bits of a partial sum on Hopper, well beyond e4m3's 4, and is
    what makes fp8 twice as fast as BF16 there.
    """
    codes, scale = (as_matrix(part, keep) for part, keep in zip(a, (1, 0), strict=True))
    out = torch._scaled_mm(
        codes,
        b[0].t(),
        scale.unsqueeze(-1),
        b[1].unsqueeze(0),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast_accum,
    )
    return restore(out, a[0], problem)


def refuse_blocks(problem: Problem, scheme: Scheme) -> str | None:
    """Return why the 1 x 32 recipe cannot take a problem, or None."""
    if scheme.activation != "mxfp8" or scheme.weight != "mxfp8":
        return f"torch._scaled_mm takes mxfp8 times mxfp8, not {scheme}"
    if isinstance(problem.K, int) and problem.K % 32:
        return f"K = {problem.K} is not a multiple of 32, as the 1 x 32 recipe needs"
    return _refuse_shape(problem)


def gemm_blocks(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Multiply mxfp8 codes with their e8m0 scale per 1 x 32; see `Kernel.gemm`."""
    codes, scale = (as_matrix(part, 1) for part in a)
    b = b if problem.b_is_weight else arrange_blocks(b)
    out = torch._scaled_mm(
        codes,
        b[0].t(),
        swizzle(scale),
        b[1],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
    )
    return restore(out, a[0], problem)


def arrange_blocks(parts: Parts) -> Parts:
    """Return mxfp8 codes ``[N, K]`` as they are, with their scales swizzled."""
    codes, scale = parts
    return codes, swizzle(scale)


def swizzle(scale: torch.Tensor) -> torch.Tensor:
    """Lay e8m0 scales out as tensor cores read them: uint8 ``[rows, K / 32]`` -> float8_e8m0fnu.

    The scale of row m and block k lies at ``(m // 128 * ceil(K / 128) + k // 4) * 512 +
    m % 32 * 16 + m % 128 // 32 * 4 + k % 4`` of the flat result, which is padded to whole tiles
    of 128 x 4 (cuBLAS documentation, "1D Block Scaling Factors Layout").
    """
    rows, columns = scale.shape
    # Counted here: what PyTorch infers of a symbolic number of rows has many guards.
    down = (rows + TILE_ROWS - 1) // TILE_ROWS
    across = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS
    padded = F.pad(scale, (0, across * TILE_COLUMNS - columns, 0, down * TILE_ROWS - rows))
    tiles = padded.reshape(down, 4, 32, across, TILE_COLUMNS)
    flat: torch.Tensor = tiles.permute(0, 3, 2, 1, 4).reshape(down * across * 512)
    return flat.view(torch.float8_e8m0fnu)


def as_matrix(part: torch.Tensor, keep: int) -> torch.Tensor:
    """Join the leading dimensions of an activation's part, but for the last ``keep``."""
    extra = part.dim() - keep
    return part if extra == 1 else part.flatten(0, extra - 1)


def restore(out: torch.Tensor, codes: torch.Tensor, problem: Problem) -> torch.Tensor:
    return out if problem.a_rank == 2 else out.unflatten(0, codes.shape[:-1])
