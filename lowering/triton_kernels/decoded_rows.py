"""Rows for GPUs without a method's arithmetic: BF16 GEMMs of weights that are stored as codes.

A weight is decoded in registers where that happens once, for results of one tile of rows. With more
rows each tile would decode it again, and by instruction counts that takes about as long as it takes
to multiply 128 rows. There the graph decodes it once, to BF16 that a cache may hold for the GEMM.

On sm_90, whose tensor cores read b from shared memory alone, decoded values take a way through it
that nothing is loaded ahead of: 128 rows by 3072 x 3072 took 22 us in the best tile, and 9 in
cuBLAS. One tile is 64 rows there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omniq_compile.lowering import decoded, decoded_bfloat16, gpu_quantize, weight_only
from omniq_compile.lowering.formats import block_size, fp8, mxfp4, mxfp4_dualscale, mxfp8
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme
from omniq_compile.lowering.triton_kernels import ops  # noqa: F401  (defines the operators)
from omniq_compile.lowering.triton_kernels.rows import SHORTEST_STEP, refuse_any

# The most rows that one tile holds, see `tiles`.
TILE_ROWS = 128


def in_one_tile(problem: Problem, tile_rows: int) -> bool:
    """Say whether all rows of a result are known to be in one tile."""
    return isinstance(problem.M, int) and tile_rows >= problem.M


def _refuse(problem: Problem, scheme: Scheme) -> str | None:
    if not problem.b_is_weight:
        return "it decodes a weight, and both operands are activations"
    return refuse_any(problem) or decoded.refuse(problem, scheme)


def _refuse_blocks(problem: Problem, scheme: Scheme) -> str | None:
    return weight_only.refuse_bfloat16(problem, scheme) or _refuse(problem, scheme)


def _multiply(
    a: Parts,
    b: Sequence[torch.Tensor | None],
    bias: torch.Tensor | None,
    problem: Problem,
    b_rows: int = 1,
    columns: int = 0,
) -> torch.Tensor:
    """Call the operator; b are codes, e8m0 scales and float32 scales, or None for either."""
    result: torch.Tensor = torch.ops.omniq.triton_decoded_gemm(
        list(a), *b, bias, problem.dtype, b_rows, columns
    )
    return result


def mx_row(
    device: str, archs: Sequence[str], method: str, why: str, tile_rows: int = TILE_ROWS
) -> Kernel:
    """Make the row of ``mxfp8`` or ``mxfp4``, before that of torch's BF16 GEMM.

    It takes few rows, and of results that torch's does not take (float16, float32) any number: the
    graph decodes the weight then.

    Args:
        device, archs: where it is offered.
        method: of the two.
        why: it is not native.
        tile_rows: up to which a weight is decoded in registers.
    """

    def refuse(problem: Problem, scheme: Scheme) -> str | None:
        refusal = _refuse_blocks(problem, scheme)
        torch_takes_it = decoded_bfloat16.refuse(problem, scheme) is None
        if refusal is None and torch_takes_it and not in_one_tile(problem, tile_rows):
            return (
                f"M = {problem.M} is not known to be one tile of {tile_rows} rows, and each tile "
                "decodes the weight again"
            )
        return refusal

    def gemm(
        a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
    ) -> torch.Tensor:
        if in_one_tile(problem, tile_rows):
            return _multiply(a, (b[0], b[1], None), bias, problem)
        dequantize = mxfp8 if scheme.weight == "mxfp8" else mxfp4
        return _multiply(a, (dequantize.dequantize_bfloat16(b), None, None), bias, problem)

    return Kernel(
        name=f"{device}_{method}_decoded_triton",
        method=method,
        device=device,
        archs=tuple(archs),
        native=False,
        about=f"{why}: Triton decodes weights exactly to BF16 in registers, for few rows",
        quantize=gpu_quantize.quantize_bfloat16,
        gemm=gemm,
        refuse=refuse,
        decodes_whole=True,
        takes_unquantized=True,
        source="triton_kernels/decoded_gemm.py",
    )


def dualscale_row(
    device: str, archs: Sequence[str], why: str, tile_rows: int = TILE_ROWS
) -> Kernel:
    """Make the row of ``mxfp4_dualscale``; the arguments are those of `mx_row`."""

    def gemm(
        a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
    ) -> torch.Tensor:
        codes, block, coarse = b
        if in_one_tile(problem, tile_rows):
            return _multiply(a, (codes, block, coarse), bias, problem, 1, mxfp4_dualscale.RUN)
        values = mxfp4.dequantize_bfloat16((codes, block))
        return _multiply(a, (values, None, coarse), bias, problem, 1, mxfp4_dualscale.RUN)

    return Kernel(
        name=f"{device}_mxfp4_dualscale_decoded_triton",
        method="mxfp4_dualscale",
        device=device,
        archs=tuple(archs),
        native=False,
        about=f"{why}: decoded exactly to BF16, a Triton GEMM applies coarse scales to float32 "
        "sums of 512",
        quantize=decoded_bfloat16.fake_quantize_scaled,
        gemm=gemm,
        refuse=_refuse_blocks,
        decodes_whole=True,
        takes_unquantized=True,
        source="triton_kernels/decoded_gemm.py",
    )


def _refuse_weight_only(problem: Problem, scheme: Scheme) -> str | None:
    if problem.dtype not in (torch.bfloat16, torch.float16):
        result = str(problem.dtype).removeprefix("torch.")
        return f"its activations stay as they are, and {result} has no fast GEMM"
    block = block_size(scheme.weight)
    if block and block[1] % SHORTEST_STEP:
        return f"a scale per {block[1]} columns is not one per {SHORTEST_STEP} or a multiple"
    return _refuse(problem, scheme)


def _gemm_weight_only(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    codes, scale = b
    # Codes of an odd K, Inductor would load as e4m3 (before torch 2.13), which Triton has not here.
    if not in_one_tile(problem, TILE_ROWS) and codes.shape[-1] % 2 == 0:
        codes = fp8.codes_bfloat16(codes).to(problem.dtype)
    x = a[0].to(problem.dtype)
    return _multiply((x,), (codes, None, scale), bias, problem, *(block_size(scheme.weight) or ()))


def fp8_weight_only_row(device: str, archs: Sequence[str], why: str) -> Kernel:
    """Make the row of fp8 weights, per row or per block, by activations that stay as they are."""
    return Kernel(
        name=f"{device}_fp8_weight_only_triton",
        method="fp8",
        device=device,
        archs=tuple(archs),
        native=False,
        about=f"{why}: weights only (W8A16), decoded exactly to 16 bits, scales in Triton's GEMM",
        quantize=weight_only.quantize,
        gemm=_gemm_weight_only,
        refuse=_refuse_weight_only,
        decodes_whole=True,
        takes_unquantized=True,
        source="triton_kernels/decoded_gemm.py",
    )
