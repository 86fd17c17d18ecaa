"""Weights that are stored quantized, in code that Dynamo leaves to Python in a compiled call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import OPTIONS, error
from torch import nn

import omniq_compile as omniq

WIDTH = 57


class BreaksInALoop(nn.Module):
    """Dynamo gives the whole frame up."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = self.linear(x)
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.gru(x)[0])


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    @torch._dynamo.disable
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.linear.weight.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(self.linear(x))


class WritesToAView(BreaksInALoop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            self.linear.weight[0].mul_(1.25)
            x = self.linear(x)
        return x


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [BreaksInALoop, Recurrent, Views, WritesToAView])
def test_a_stored_weight_works_in_them(kind: Callable[[], nn.Module], compiler: str) -> None:
    plain, x = kind().requires_grad_(False), torch.randn(2, 5, WIDTH)
    model = kind().requires_grad_(False)
    model.load_state_dict(plain.state_dict())
    omniq.quantize_(model, OPTIONS)
    fast = torch.compile(model, backend="omniq", options=OPTIONS | {"compiler": compiler})
    with torch.no_grad():
        for _ in range(2):
            assert error(fast(x), plain(x)) < 0.02
    weight: Any = model.linear.weight
    assert error(weight.dequantize(), plain.linear.weight) < 0.015
