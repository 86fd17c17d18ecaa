"""One or two rows by a weight: a sum of products in a loop of Inductor's, which reads it once.

The modulations of a diffusion transformer multiply one row, the embedding of the time step, by
weights as large as any. That takes as long as reading the weight does, and a GEMM that is cut into
tiles of 64 rows reads it slowly: on an H200 1 x 18432 x 3072 takes the best tile for int8 35 us,
and one that decodes MX codes 107 to 190. Its codes alone can be read in 13 to 15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniq_compile.lowering import decoded, gpu_quantize
from omniq_compile.lowering.emulated import ELEMENTS
from omniq_compile.lowering.formats import float_codes, int8, mx, mxfp4_dualscale
from omniq_compile.lowering.formats.blocks import repeat
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme

# With more rows the weight is read again for each; and Inductor stores decoded e2m1 for two.
MOST_ROWS = {"int8": 2, "mxfp8": 2, "mxfp4": 1, "mxfp4_dualscale": 1}


def _refuse(problem: Problem, scheme: Scheme) -> str | None:
    most = MOST_ROWS[scheme.method]
    if not isinstance(problem.M, int) or most < problem.M:
        return f"M = {problem.M}, and it is for up to {most}"
    if not problem.b_is_weight or problem.b_rank > 2:
        return "it takes one weight, and both operands are activations"
    return decoded.refuse(problem, scheme)


def _gemm_int8(a: Parts, b: Parts, bias: Tensor | None, problem: Problem, scheme: Scheme) -> Tensor:
    """Sum products of codes in int32, exactly; see `Kernel.gemm`."""
    codes = gpu_quantize.stored(a[0]).to(torch.int32)
    sums = (codes.unsqueeze(-2) * b[0].to(torch.int32)).sum(dim=-1, dtype=torch.int32)
    return int8.epilogue(sums, a[1], b[1], bias, problem.dtype)


def _decode(parts: Parts, format: str) -> list[Tensor]:
    """Decode a weight to float32: ``[N, K']``, or two ``[N, K' / 2]`` of even and odd k."""
    codes, scale, *coarse = parts
    if format == "mxfp8":
        return [mx.dequantize(codes.to(torch.float32), scale)]
    halves = [mx.dequantize(half, scale) for half in float_codes.e2m1_pairs(codes)]
    if not coarse:
        return halves
    repeated = repeat(coarse[0], -1, mxfp4_dualscale.RUN // 2, halves[0].shape[-1])
    return [half * repeated for half in halves]


def _gemm_decoded(
    a: Parts, b: Parts, bias: Tensor | None, problem: Problem, scheme: Scheme
) -> Tensor:
    """Sum products of decoded values in float32; see `Kernel.gemm`."""
    x = gpu_quantize.stored(a[0])
    weights = _decode(b, scheme.weight)
    products = [
        x[..., start :: len(weights)].unsqueeze(-2) * weight for start, weight in enumerate(weights)
    ]
    out = (products[0] if len(products) == 1 else products[0] + products[1]).sum(dim=-1)
    if bias is not None:
        out = out + bias
    return out.to(problem.dtype)


def _decoded(method: str) -> Kernel:
    return Kernel(
        name=f"cuda_{method}_few_rows",
        method=method,
        device="cuda",
        archs=("sm_90",),
        native=False,
        about=f"few rows: {ELEMENTS[method]} codes are decoded, multiplied and summed in float32 "
        "in one loop by Inductor",
        quantize=decoded.quantize,
        gemm=_gemm_decoded,
        refuse=_refuse,
    )


INT8 = Kernel(
    name="cuda_s8_few_rows",
    method="int8",
    device="cuda",
    archs=("sm_90",),
    native=True,
    about="few rows: codes are multiplied and summed in int32 in one loop by Inductor",
    quantize=gpu_quantize.quantize,
    gemm=_gemm_int8,
    refuse=_refuse,
)
DECODED = tuple(map(_decoded, ("mxfp8", "mxfp4", "mxfp4_dualscale")))
