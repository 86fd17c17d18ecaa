"""Whether a model computes in lower precision than float32, beside layers that it keeps in that."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import nn

from omniq_compile.passes.sites import Kind, Site

LOW = (torch.bfloat16, torch.float16)

# Autocast casts, in models whose parameters do not show it. One graph may hold a part alone that is
# left out of it, which the graphs before have shown.
_seen: WeakSet[nn.Module] = WeakSet()


def has_low_precision(model: nn.Module | None) -> bool:
    """Say whether a model has linear layers of low precision, or had products of it in a graph."""
    if model is None:
        return False
    # Not its `weight`, which a parametrization computes when it is asked for, and may write to.
    parameters = (p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters())
    return model in _seen or any(parameter.dtype in LOW for parameter in parameters)


def note_precision(model: nn.Module | None, sites: Sequence[Site]) -> None:
    """Remember of a model what one of its graphs shows."""
    if model is not None and any(s.kind is Kind.WEIGHT and s.dtype in LOW for s in sites):
        _seen.add(model)
