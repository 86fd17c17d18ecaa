"""Writes that no name or counter shows are seen all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS, compiled, error
from torch import nn


@torch.compiler.allow_in_graph
def bump(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x.sum()


def add_by_numpy(x: torch.Tensor) -> None:
    array = x.numpy()
    array += 1


def fill_by_numpy(x: torch.Tensor) -> None:
    x.numpy()[2:5] = 3


WRITERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "allow_in_graph": bump, "numpy": add_by_numpy, "numpy index": fill_by_numpy,
}  # fmt: skip


class Between(nn.Module):
    """Two layers of one input, and two products of one buffer, with a write between."""

    def __init__(self, write: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(38, 57), nn.Linear(38, 57)
        self.register_buffer("table", torch.randn(57, 38))
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.q(x) + F.linear(x, self.table)
        self.write(x)
        self.write(self.table)
        return y + self.k(x) + F.linear(x, self.table)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_function_that_nothing_is_known_of_may_write(name: str, compiler: str) -> None:
    if compiler == "inductor" and torch.__version__ < "2.12":
        # Also where `torch._int_mm` and what quantizes for it are written out in the model.
        pytest.skip("Inductor of 2.11 writes to x before all that reads it has")
    model, x = Between(WRITERS[name]).requires_grad_(False), torch.randn(7, 38)
    plain, same = copy.deepcopy(model), x.clone()
    with torch.no_grad():
        result = compiled(model, compiler=compiler)(x)
    assert error(result, plain(same)) < 0.02
    assert torch.equal(x, same)
    assert torch.equal(model.table, plain.table)


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(512, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.keys)


def test_rows_of_a_buffer_that_has_no_counter_are_followed() -> None:
    """As a cache under inference_mode, which PyTorch counts no writes of."""
    with torch.inference_mode():
        model, x = Bank(), torch.randn(4, 64)
        fast = torch.compile(model, backend="omniq", options=OPTIONS | {"compiler": "eager"})
        fast(x)
        for row in range(0, 512, 37):
            model.keys[row] = torch.randn(64) * 3
            assert error(fast(x)[:, row], model(x)[:, row]) < 0.05
