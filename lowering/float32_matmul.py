"""``omniq::float32_matmul``: a float32 product that a caller's autocast leaves in float32."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("omniq::float32_matmul", mutates_args=())
def float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.transpose(-1, -2)``.

    Args:
        a: float32 ``[..., M, K]``.
        b: float32 ``[N, K]`` or ``[..., N, K]``; leading dimensions broadcast against a's.
    """
    # Dynamo has the caller's autocast on while it runs a compiled graph; BF16 sums would be
    # rounded before the scales and the bias are applied.
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a, b.transpose(-1, -2))


@float32_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    batch = a.shape[:-2] if b.dim() == 2 else torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-2]))
