"""Whether a model computes in lower precision than float32, beside layers that it keeps in that."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from omniq_compile.passes import dynamo
from omniq_compile.passes.sites import Kind, Site

LOW = (torch.bfloat16, torch.float16)


class SeenCasts:
    """Which models cast the weights of layers, which their parameters do not show.

    One graph may hold a part alone that is left out of autocast, and graphs before it show the
    rest. What a caller turned on around the model says nothing of calls without it, so each graph
    is told what graphs showed that began in the same state.
    """

    def __init__(self) -> None:
        """Begin with no model."""
        self._seen: WeakKeyDictionary[nn.Module, set[frozenset[str]]] = WeakKeyDictionary()

    def has_low_precision(self, model: nn.Module | None) -> bool:
        """Say whether a model has linear layers of low precision, or cast some in a graph."""
        if model is None:
            return False
        # Not its `weight`, which a parametrization computes when it is asked for, and may write to.
        linears = (m for m in model.modules() if isinstance(m, nn.Linear))
        stored = any(p.dtype in LOW for linear in linears for p in linear.parameters())
        return stored or _autocast() in self._seen.get(model, ())

    def note(self, model: nn.Module | None, sites: Sequence[Site]) -> None:
        """Remember of a model what one of its graphs shows."""
        # What is stored in low precision is no cast, and may be stored in another later.
        if model is not None and any(map(_casts_weight, sites)):
            self._seen.setdefault(model, set()).add(_autocast())


def _casts_weight(site: Site) -> bool:
    if site.kind is not Kind.WEIGHT or site.dtype not in LOW:
        return False
    leaves = site.weight.leaves if site.weight is not None else ()
    return site.autocast or any(dynamo.value(leaf).dtype not in LOW for leaf in leaves)


def _autocast() -> frozenset[str]:
    """Return the types of devices for which autocast is on where Dynamo's graph begins."""
    accelerator = torch.accelerator.current_accelerator()
    types = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    available = filter(torch.amp.is_autocast_available, types)
    return frozenset(filter(torch.is_autocast_enabled, available))
