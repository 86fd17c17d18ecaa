"""The float formats on CPUs: a weight is decoded tile by tile inside the GEMM."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import gcd

import torch

from omniq_compile.lowering import decoded, weight_only
from omniq_compile.lowering.cpu import (
    library,
    quantize,
    quantize_activation,
    tile_gemm,  # noqa: F401  (defines the operator)
)
from omniq_compile.lowering.emulated import ELEMENTS
from omniq_compile.lowering.formats import block_size, mxfp4_dualscale
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme

# A scale for fewer columns would cost more than the products between two of them.
FEWEST_COLUMNS = 32


def _refuse(problem: Problem, scheme: Scheme) -> str | None:
    if not problem.b_is_weight:
        return "it decodes a weight, and both operands are activations"
    if problem.b_rank > 2:
        return "it takes no batch of matrices"
    formats = (scheme.weight,) if scheme.weight_only else (scheme.activation, scheme.weight)
    for name in formats:
        if name not in quantize.METHODS and not block_size(name):
            return f"its C++ has no case for {name}"
    columns = [block[1] for block in map(block_size, formats) if block]
    if gcd(*columns) % FEWEST_COLUMNS:
        return f"a scale per {columns[-1]} columns is not one per {FEWEST_COLUMNS} or a multiple"
    return weight_only.refuse_bfloat16(problem, scheme) or decoded.refuse(problem, scheme)


def _gemm(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    multiply = partial(torch.ops.omniq.cpu_tile_gemm, a[0], a[1] if len(a) > 1 else None, b[0])
    columns = (0, 1, 0)
    block_scale = scale = None
    if scheme.weight == "fp8":
        scale = b[1]
    elif block := block_size(scheme.weight):
        group = block_size(scheme.activation) or block
        scale, columns = b[1], (group[1], *block)
    elif len(b) > 2:
        _, block_scale, scale = b
        columns = (mxfp4_dualscale.RUN, 1, mxfp4_dualscale.RUN)
    else:
        block_scale = b[1]
    result: torch.Tensor = multiply(block_scale, scale, bias, *columns, problem.dtype)
    return result


def _start(source: str, problem: Problem) -> None:
    """Begin to build what multiplies, and what quantizes activations."""
    library.start(source)
    library.start("quantize")


def bfloat16(method: str) -> Kernel:
    """Make the row of a method of `ELEMENTS` where the CPU multiplies BF16."""
    return Kernel(
        name=f"cpu_{method}_bfloat16",
        method=method,
        device="cpu",
        archs=("avx512_bf16",),
        native=False,
        about=f"no {ELEMENTS[method]} arithmetic on CPUs: tiles of a weight decoded exactly to "
        "BF16, multiplied by oneDNN's brgemm, scales applied to its float32 sums",
        quantize=quantize_activation.lower,
        gemm=_gemm,
        refuse=_refuse,
        takes_unquantized=True,
        source="cpu/tile_gemm.cpp",
        start=partial(_start, "tile_gemm"),
    )


def float32(method: str) -> Kernel:
    """Make the row of a method of `ELEMENTS` where it multiplies float32 alone."""
    return replace(
        bfloat16(method),
        name=f"cpu_{method}_float32_tiles",
        archs=("avx512_vnni", "generic"),
        about=f"no {ELEMENTS[method]} arithmetic on CPUs: tiles of a weight decoded exactly to "
        "float32, multiplied in it",
        source="cpu/decode.cpp",
        start=partial(_start, "decode"),
    )


KERNELS = tuple(row(method) for row in (bfloat16, float32) for method in ELEMENTS)
