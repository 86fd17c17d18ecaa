"""The linears that a call of a model runs, and on how many rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def linear_calls(model: nn.Module, call: Callable[[], Any]) -> list[tuple[nn.Linear, int]]:
    """Run ``call`` and return each linear of the model that it ran, in order, with its rows."""
    found: list[tuple[nn.Linear, int]] = []

    def note(module: Any, args: Any, output: torch.Tensor) -> None:
        found.append((module, args[0].numel() // args[0].shape[-1]))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return found
