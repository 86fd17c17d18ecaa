"""Scales that several neighbours share: whole blocks out of ragged rows, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pad_last(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Append zeros until the last dimension is a multiple."""
    # Not a concatenation: Inductor's C++ backend does not fuse one with the quantize arithmetic,
    # and got the last block of the fused loop wrong.
    missing = -x.shape[-1] % multiple
    return F.pad(x, (0, missing)) if missing else x


def repeat(scale: torch.Tensor, dim: int, times: int, size: int) -> torch.Tensor:
    """Give each of ``size`` neighbours along a dimension its block's scale.

    Args:
        scale: any shape, ``ceil(size / times)`` along ``dim``.
        dim: counted from the end, negative.
        times: the size of a block; the last one may be cut short by ``size``.
        size: of the result along ``dim``.
    """
    if size % times:
        # Not an integer division: Inductor's C++ backend turns one into a split loop that leaves
        # out the last, incomplete block (pytorch issue 195582). Exact for every size below 2**22.
        # Counted from the scale's own tensor, so that a kernel can be traced into a graph.
        # Of integers: on GPUs a sum of floats is not among the deterministic algorithms.
        place = scale.new_ones((size,), dtype=torch.int64).cumsum(0).to(torch.float32)
        at = (place - 0.5) / times
        return scale.index_select(dim, at.to(torch.int64))
    shape = [-1] * (scale.dim() + 1)
    shape[dim] = times
    return scale.unsqueeze(dim).expand(shape).flatten(dim - 1, dim)
