"""Quantizes a weight by the fastest means at hand, to the same bits, and looks for NaN and Inf."""

from __future__ import annotations

import torch

from omniq_compile.lowering.cpu import quantize as on_cpu
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.formats.float_codes import E8M0_NAN
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.formats.rows import quantize_rows


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
