"""Quantizes a weight by the fastest means at hand, to the same bits, and looks for NaN and Inf."""

from __future__ import annotations

import torch

from omniq_compile.lowering.cpu import quantize as on_cpu
from omniq_compile.lowering.errors import WeightError
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.formats.float_codes import E8M0_NAN
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.formats.rows import quantize_rows
from omniq_compile.lowering.tensor_of_parts import foreign_kind


def quantize_weight(weight: torch.Tensor, format: str) -> tuple[torch.Tensor, ...]:
    """Return the contiguous parts of ``weight [..., N, K]`` in a format."""
    form = get_format(format)
    if on_cpu.takes(weight, form):
        return on_cpu.quantize(weight, form)
    return quantize_rows(weight, form)


def holds_finite(parts: Parts) -> bool:
    """Say whether the values that became ``parts`` were finite: others show in the scales."""
    return all(
        bool((scale != E8M0_NAN).all() if scale.dtype is torch.uint8 else scale.isfinite().all())
        for scale in parts[1:]
    )


def check_weight(weight: torch.Tensor) -> None:
    """Check that a tensor can be quantized as a weight, but for its values.

    Raises:
        WeightError: it is not a dense matrix of at least 16-bit floating numbers, is empty, or is
            made of other tensors.
    """
    if not isinstance(weight, torch.Tensor):
        raise WeightError(f"a weight is a torch.Tensor, not {type(weight).__name__}.")
    if kind := foreign_kind(weight):
        raise WeightError(
            f"cannot quantize a {kind}, whose values other tensors hold: "
            "give the values as a plain tensor."
        )
    if weight.layout is not torch.strided:
        raise WeightError(f"a weight is dense, not {weight.layout}. Give weight.to_dense().")
    # Codes of 8 bits are floating too, and mean nothing without their scales.
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise WeightError(
            f"cannot quantize a tensor of {weight.dtype}: a weight is of float32, bfloat16 or "
            "float16. Is it quantized already?"
        )
    if weight.dim() < 2 or not weight.numel():
        raise WeightError(
            f"cannot quantize a tensor of shape {list(weight.shape)}: a weight is [..., N, K] with "
            "at least one element, output features before input features."
        )


def check_finite(parts: Parts, format: str) -> None:
    """Check the parts of a quantized weight; those without values, as in a traced graph, pass.

    Raises:
        WeightError: the weight held NaN or Inf.
    """
    if any(part.device.type == "meta" or type(part) is not torch.Tensor for part in parts):
        return
    if not holds_finite(parts):
        raise WeightError(f"the weight holds NaN or Inf, which {format} cannot represent.")
