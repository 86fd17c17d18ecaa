"""What Inductor is told about a graph's inputs, and its settings: what CUDA graphs go by."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import omniq_compile

OPTIONS = {"method": "int8", "min_features": 1, "mode": "reduce-overhead"}


class Told(Exception):
    """Stops a compile where Inductor knows its inputs, before it generates code."""


def told(call: Any) -> tuple[int, int, bool]:
    """Return how many inputs the graph has, how many stay in place, and if CUDA graphs are on."""
    import torch._inductor.compile_fx as compile_fx

    found: list[tuple[int, int, bool]] = []

    def stop(inputs: Any, static: Any) -> Any:
        found.append((len(inputs), len(set(static)), torch._inductor.config.triton.cudagraphs))
        raise Told

    with (
        mock.patch.object(compile_fx, "get_input_idxs_to_check", stop),
        torch._inductor.config.patch(force_disable_caches=True),
        torch.no_grad(),
        pytest.raises(Exception, match="Told"),
    ):
        call(torch.randn(7, 48))
    return found[-1]


def layers() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 80), nn.GELU()).requires_grad_(False)


def test_weights_stay_in_place_and_activations_do_not() -> None:
    """A CUDA graph copies every other input in each replay. Plain Inductor copies one, too."""
    # Norm and linear, weight and bias each; a quantized weight is codes and scale.
    assert told(torch.compile(layers())) == (5, 4, False)
    assert told(torch.compile(layers(), backend="omniq", options=OPTIONS)) == (6, 5, True)


def test_stored_weights_stay_in_place() -> None:
    stored = layers()
    omniq_compile.quantize_(stored, OPTIONS)
    assert told(torch.compile(stored, backend="omniq", options=OPTIONS)) == (6, 5, True)


def test_a_mode_reaches_the_blocks_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([layers(), layers()])

    model = Model()
    omniq_compile.compile(model, OPTIONS | {"mode": "default"}, mode="reduce-overhead")
    assert told(model.blocks[0]) == (6, 5, True)
