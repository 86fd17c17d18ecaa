"""Calls of a model on the trajectory of real generations, to be made again on changed layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

# The largest error there is. NaN would be neither more nor less than others, and infinities are
# NaN when two of them are divided.
BROKEN = 1e30


@dataclass(frozen=True)
class Call:
    """One call as the pipeline made it, and what it returned."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    expected: torch.Tensor

    def error(self) -> float:
        """Call again; returns ``||out - expected||**2 / ||expected||**2``, in float64.

        An output that is not finite has `BROKEN`.
        """
        with torch.no_grad():
            out = flat_output(self.model(*self.args, **self.kwargs))
        expected = self.expected.double()
        difference = out.double() - expected
        error = float(difference.square().sum() / expected.square().sum().clamp_min(1e-300))
        return error if math.isfinite(error) else BROKEN


def flat_output(output: Any) -> torch.Tensor:
    """Return every number that a model returned, in a row."""
    leaves = tree_leaves(output if not hasattr(output, "to_tuple") else output.to_tuple())
    tensors = [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return torch.cat([tensor.flatten() for tensor in tensors])


class _Recorder:
    """Keeps every so many calls: when there are too many, every second of those goes."""

    def __init__(self, model: nn.Module, most: int) -> None:
        self._model, self._most = model, most
        self._stride, self._seen = 1, 0
        self.calls: list[Call] = []

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._seen % self._stride == 0:
            expected = flat_output(output).clone()
            self.calls.append(Call(model, _copied(args), _copied(kwargs), expected))
        self._seen += 1
        if len(self.calls) > self._most:
            self.calls = self.calls[::2]
            self._stride *= 2


def _copied(value: Any) -> Any:
    # The scheduler may write into the latents that it was given.
    return tree_map_only(torch.Tensor, torch.clone, value)


@contextmanager
def recording(models: Sequence[nn.Module], most: int) -> Iterator[list[Call]]:
    """Record up to ``most`` calls of each model, evenly over all that are made inside."""
    calls: list[Call] = []
    with ExitStack() as stack:
        recorders = [_Recorder(model, most) for model in models]
        for recorder, model in zip(recorders, models, strict=True):
            hook = model.register_forward_hook(recorder, with_kwargs=True)
            stack.callback(hook.remove)
        yield calls
    for recorder in recorders:
        calls += recorder.calls
