"""The ``omniq::`` operators that a rewritten graph holds before it is lowered.

They have a reference implementation, so that the quantized stage of any graph runs as it stands,
on any device. Lowering replaces every one of them by the target's kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniq_compile.lowering import reference
from omniq_compile.lowering.formats import get_format


@torch.library.custom_op("omniq::quantize", mutates_args=())
def quantize(x: Tensor, format: str) -> list[Tensor]:
    """Quantize along the last dimension: ``x [..., K]`` -> the format's parts, codes first."""
    return [part.contiguous() for part in get_format(format).quantize(x)]


def quantize_like(x: Tensor, format: str) -> list[Tensor]:
    """Return what `quantize` returns, without values."""
    return list(get_format(format).allocate(x))


quantize.register_fake(quantize_like)


@torch.library.custom_op("omniq::gemm", mutates_args=())
def gemm(
    a: list[Tensor],
    b: list[Tensor],
    bias: Tensor | None,
    a_format: str,
    b_format: str,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply quantized operands: a ``[..., M, K]``, b ``[N, K]`` or ``[..., N, K]``.

    The bias ``[N]`` is added before the one rounding to ``dtype``. Returns ``[..., M, N]``.
    """
    return reference.gemm(a, b, bias, a_format, b_format, dtype)


def gemm_like(
    a: list[Tensor],
    b: list[Tensor],
    bias: Tensor | None,
    a_format: str,
    b_format: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return what `gemm` returns, without values."""
    batch = a[0].shape[:-2]
    if b[0].dim() > 2:
        batch = torch.broadcast_shapes(batch, b[0].shape[:-2])
    return a[0].new_empty((*batch, a[0].shape[-2], b[0].shape[-2]), dtype=dtype)


gemm.register_fake(gemm_like)
