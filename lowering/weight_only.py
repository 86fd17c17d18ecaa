"""The row of weights that are quantized alone, on any device: decoded, and multiplied by torch.

The weight becomes what the uncompiled code of a model with stored weights works on: its values in
the activation's dtype, each rounded once. What stays in memory are its codes; one decoded weight is
held for the length of its product.
"""

from __future__ import annotations

import torch

from omniq_compile.lowering import decoded
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.materialized import first_columns
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme
from omniq_compile.lowering.target import ARCHITECTURES


def quantize(x: torch.Tensor, format: str) -> Parts:
    """Return the activation as it is."""
    return (x,)


def decode_weight(parts: Parts, format: str) -> Parts:
    """Return what `gemm` decodes a weight to: float32 ``[..., N, K]``, K padded to whole blocks."""
    values, *scale = decoded.decode_weight(parts, format)
    return (values * scale[0].unsqueeze(-1) if scale else values,)


def gemm(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Decode a weight, and multiply in the result's dtype, as autocast does; see `Kernel.gemm`."""
    values = decode_weight(b, scheme.weight)[0] if problem.b_is_weight else b[0]
    x, weight = a[0].to(problem.dtype), first_columns(values.to(problem.dtype), problem.K)
    if bias is not None:
        bias = bias.to(problem.dtype)
    if problem.b_rank == 2:
        return torch.nn.functional.linear(x, weight, bias)
    out = torch.matmul(x, weight.transpose(-1, -2))
    return out if bias is None else out + bias


def refuse(problem: Problem, scheme: Scheme) -> str | None:
    """Return why a problem has no weight to decode, or None."""
    return None if problem.b_is_weight else "both operands are activations"


def refuse_bfloat16(problem: Problem, scheme: Scheme) -> str | None:
    """Return why a GEMM of BF16 by whole blocks does not take activations that stay as they are."""
    if not scheme.weight_only:
        return None
    if problem.dtype is not torch.bfloat16:
        dtype = str(problem.dtype).removeprefix("torch.")
        return f"activations stay in {dtype}, and it multiplies bfloat16"
    if get_format(scheme.weight).padded(problem.K) != problem.K:
        return f"K = {problem.K} is no whole number of blocks, and activations are not padded"
    return None


def row(device: str, method: str) -> Kernel:
    """Make the row of one method on one device."""
    return Kernel(
        name=f"{device}_{method}_weight_only",
        method=method,
        device=device,
        archs=ARCHITECTURES[device],
        native=False,
        about="activation_scheme 'none': weights decoded to the dtype of activations, torch's GEMM",
        quantize=quantize,
        gemm=gemm,
        refuse=refuse,
        decodes_whole=True,
        takes_unquantized=True,
    )
