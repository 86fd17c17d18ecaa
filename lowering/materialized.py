"""Says to Inductor what is to be in memory, and not computed again where it is read."""

from __future__ import annotations

import torch


def stored(x: torch.Tensor) -> torch.Tensor:
    """Return x, materialized: Inductor would compute it again for every reader.

    Inductor cannot look through `torch.as_strided`, whose operand has to be in memory. Checked on
    torch 2.11 to 2.15.
    """
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * size)
    return x.contiguous().as_strided(x.shape, strides)


def first_columns(values: torch.Tensor, K: int) -> torch.Tensor:
    """Return ``values [..., :K]`` of whole blocks ``[..., K']``, which are in memory before.

    Inductor's C++ backend would make whole blocks of a slice of blocks, and leave out the last,
    incomplete one (pytorch issue 195582).
    """
    return values if values.shape[-1] == K else stored(values)[..., :K]
