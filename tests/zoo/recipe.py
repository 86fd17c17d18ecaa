"""A recipe: how to build one class small, and what to call it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

BATCH = 2


class Draw:
    """Random tensors from one seed: floating ones in the model's dtype."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> None:
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        """Return standard normal values, the same ones in every dtype."""
        return torch.randn(shape, generator=self._generator).to(self.dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """Return integers in [0, high)."""
        return torch.randint(high, shape, generator=self._generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Return float32 values in [0, 1), such as the angles of rotary embeddings."""
        return torch.rand(shape, generator=self._generator)

    def rotary(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and sines of random angles."""
        angles = self.uniform(*shape)
        return angles.cos(), angles.sin()

    def time(self, value: float, *shape: int) -> torch.Tensor:
        """Return a timestep in the model's dtype, a different one for each sample."""
        steps = torch.linspace(1.0, 0.5, (shape or (BATCH,))[0])
        steps = steps.view(-1, *[1] * (len(shape) - 1)).expand(shape or (BATCH,))
        return (value * steps).to(self.dtype)

    def ones(self, *shape: int) -> torch.Tensor:
        """Return ones in the model's dtype, such as a mask that masks nothing."""
        return torch.ones(shape, dtype=self.dtype)


def grid(*sizes: int) -> torch.Tensor:
    """Return the integer coordinates of a grid's cells, ``[cells, axes]``."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes))


def prefixed(positions: torch.Tensor, columns: int) -> torch.Tensor:
    """Put columns of zeros before the coordinates, as where time comes first."""
    return torch.cat([positions.new_zeros(len(positions), columns), positions], dim=1)


@dataclass(frozen=True)
class Recipe:
    """One class in a size that runs in a moment, but with every kind of layer alive.

    Attributes:
        config: arguments of the constructor.
        inputs: draws the keyword arguments of one forward, of `BATCH` samples where it can.
        not_traced: patterns of layers that plain ``torch.compile`` runs outside of any graph,
            because the function that calls them has a graph break inside a loop.
        scales: what some layers' weights are multiplied by; see `redraw`.
        dtype: of the model, BF16 if it can; why_dtype says why not.
    """

    config: Mapping[str, Any]
    inputs: Callable[[Draw], dict[str, Any]]
    not_traced: tuple[str, ...] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    why_dtype: str = ""
