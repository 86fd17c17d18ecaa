"""Rows for the devices' tables: what each Triton GEMM takes, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from math import gcd

import torch

from omniq_compile.lowering import decoded as decoded_float32
from omniq_compile.lowering import gpu_quantize, int8_gemms
from omniq_compile.lowering.formats import block_size
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme
from omniq_compile.lowering.triton_kernels import ops  # noqa: F401  (defines the operators)
from omniq_compile.lowering.triton_kernels.tiles import count

# The shortest step along K that tensor cores multiply 8-bit elements in.
SHORTEST_STEP = 32


def b_format(problem: Problem, scheme: Scheme) -> str:
    """Return the format that the second operand is in."""
    return scheme.weight if problem.b_is_weight else scheme.activation


def refuse_any(problem: Problem) -> str | None:
    """Return why no Triton kernel takes a problem, or None.

    Only a machine with a GPU needs Triton: any other one lowers to be read.
    """
    if problem.b_rank > 2:
        return "the Triton kernels take no batch of matrices"
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def _refuse_int8(problem: Problem, scheme: Scheme) -> str | None:
    return refuse_any(problem) or int8_gemms.refuse(problem, scheme)


def _gemm_rows(fnuz: bool) -> Callable[..., torch.Tensor]:
    def gemm(
        a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
    ) -> torch.Tensor:
        result: torch.Tensor = torch.ops.omniq.triton_row_scaled_gemm(
            a[0], a[1], b[0], b[1], bias, problem.dtype, fnuz
        )
        return result

    return gemm


def int8(device: str, archs: Sequence[str], how: str) -> Kernel:
    """Make the int8 row.

    Args:
        device, archs: where it is offered.
        how: the instruction that multiplies, such as ``"s8 wgmma"``.
    """
    return Kernel(
        name=f"{device}_s8_triton",
        method="int8",
        device=device,
        archs=tuple(archs),
        native=True,
        about=f"Triton ({how}), scales and bias in its epilogue: no int32 matrix is stored",
        quantize=gpu_quantize.quantize,
        gemm=_gemm_rows(fnuz=False),
        refuse=_refuse_int8,
        source="triton_kernels/row_scaled_gemm.py",
    )


def _refuse_fp8_rows(problem: Problem, scheme: Scheme) -> str | None:
    if block_size(scheme.weight):
        return f"it takes a scale per row, and {scheme.weight} has one per block"
    return refuse_any(problem)


def fp8(device: str, archs: Sequence[str], how: str, fnuz: bool = False) -> Kernel:
    """Make the row of fp8 with a scale per row of both; ``fnuz`` for gfx942."""
    return Kernel(
        name=f"{device}_fp8_triton",
        method="fp8",
        device=device,
        archs=tuple(archs),
        native=True,
        about=f"Triton ({how}), a scale per row of both, scales and bias in its epilogue",
        quantize=gpu_quantize.quantize,
        gemm=_gemm_rows(fnuz),
        refuse=_refuse_fp8_rows,
        source="triton_kernels/row_scaled_gemm.py",
    )


# What a GEMM of few tiles is cut into, see `tiles`.
SMALL_TILE = 64


def fp8_few_tiles(device: str, archs: Sequence[str], how: str, most: int) -> Kernel:
    """Make the row of `fp8` for results of up to ``most`` small tiles, ahead of larger kernels.

    One row, of any number of columns, has a tile of its own, see `tiles`.
    """

    def refuse(problem: Problem, scheme: Scheme) -> str | None:
        M, N = problem.M, problem.N
        if not (isinstance(M, int) and isinstance(N, int)):
            return f"M = {M} and N = {N} are not both known"
        tiles = count(M, N, SMALL_TILE, SMALL_TILE)
        if M > 1 and tiles > most:
            return f"{tiles} tiles of {SMALL_TILE} x {SMALL_TILE}, and it is for up to {most}"
        return _refuse_fp8_rows(problem, scheme)

    return dataclasses.replace(
        fp8(device, archs, how),
        name=f"{device}_fp8_few_tiles_triton",
        about=f"Triton ({how}), a scale per row of both: results of few tiles, so that each is "
        "an SM's only one, or of one row",
        refuse=refuse,
    )


def _refuse_fp8_blocks(problem: Problem, scheme: Scheme) -> str | None:
    group, block = block_size(scheme.activation), block_size(b_format(problem, scheme))
    if group is None or block is None:
        return f"it takes scales per block, and {scheme.weight} has one per row"
    step = gcd(group[1], block[1])
    if step % SHORTEST_STEP:
        return (
            f"activations have a scale per {group[1]} columns and weights per {block[1]}: "
            f"{step} columns share both, and tensor cores multiply {SHORTEST_STEP} at a time"
        )
    return refuse_any(problem)


def _gemm_blocks(fnuz: bool) -> Callable[..., torch.Tensor]:
    def gemm(
        a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
    ) -> torch.Tensor:
        group, block = block_size(scheme.activation), block_size(b_format(problem, scheme))
        assert group is not None
        assert block is not None
        result: torch.Tensor = torch.ops.omniq.triton_block_scaled_gemm(
            a[0], a[1], b[0], b[1], bias, problem.dtype, group[1], *block, fnuz
        )
        return result

    return gemm


def fp8_blocks(device: str, archs: Sequence[str], how: str, fnuz: bool = False) -> Kernel:
    """Make the row of block-wise fp8; ``fnuz`` for gfx942."""
    return Kernel(
        name=f"{device}_fp8_block_triton",
        method="fp8",
        device=device,
        archs=tuple(archs),
        native=True,
        about=f"Triton ({how}), a scale per block of both, applied to float32 sums along K",
        quantize=gpu_quantize.quantize,
        gemm=_gemm_blocks(fnuz),
        refuse=_refuse_fp8_blocks,
        source="triton_kernels/block_scaled_gemm.py",
    )


def _gemm_mx(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    result: torch.Tensor = torch.ops.omniq.triton_mx_gemm(list(a), list(b), bias, problem.dtype)
    return result


def _refuse_mx(problem: Problem, scheme: Scheme) -> str | None:
    return refuse_any(problem) or decoded_float32.refuse(problem, scheme)


def _refuse_mixed(problem: Problem, scheme: Scheme) -> str | None:
    if problem.b_is_weight and scheme.activation != scheme.weight:
        return f"Triton multiplies {scheme.activation} by {scheme.weight} in BF16 here"
    return _refuse_mx(problem, scheme)


def mx(device: str, archs: Sequence[str], method: str, how: str, mixed: bool = True) -> Kernel:
    """Make a row of an MX method for block-scaled tensor cores.

    Args:
        device, archs: where it is offered.
        method: ``mxfp8``, ``mxfp4`` or ``mxfp4_dualscale``.
        how: the instruction that multiplies.
        mixed: the instruction multiplies e4m3 by e2m1 too.
    """
    coarse = ", coarse scales applied to float32 sums" if method == "mxfp4_dualscale" else ""
    return Kernel(
        name=f"{device}_{method}_triton",
        method=method,
        device=device,
        archs=tuple(archs),
        native=True,
        about=f"Triton dot_scaled ({how}), an e8m0 scale per 1 x 32{coarse}, bias in its epilogue",
        quantize=gpu_quantize.quantize,
        gemm=_gemm_mx,
        refuse=_refuse_mx if mixed else _refuse_mixed,
        source="triton_kernels/mx_gemm.py",
    )
