"""Many calls at changing sizes: flat memory, and no more compiles than without omniq."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_flux import OPTIONS, inputs, tiny_flux
from torch.nn import functional

from omniq_compile.backend import omniq
from omniq_compile.compiling.weights import resident_bytes, statistics

SIZES = [
    (rows, columns, batch) for rows, columns in ((4, 5), (6, 6), (3, 8), (7, 4)) for batch in (1, 2)
]


# A model, and how it is called at a size: rows, columns and batch.
Model = tuple[torch.nn.Module, Callable[[Any, int, int, int], torch.Tensor]]


class Counting:
    """Counts the graphs that Dynamo hands to a backend."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.graphs = backend, 0

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        self.graphs += 1
        return self.backend(gm, example_inputs)


def plain(gm: Any, example_inputs: Any) -> Any:
    return gm.forward


def quantized(gm: Any, example_inputs: Any) -> Any:
    return omniq(gm, example_inputs, options=OPTIONS)


def memory() -> int:
    """Return the bytes of this process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Block(torch.nn.Module):
    """Modulation, attention over text and picture, and an MLP, without what diffusers adds."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.modulation = torch.nn.Linear(width, 2 * width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 3 * width), torch.nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(time).unsqueeze(1).chunk(2, dim=-1)
        both = functional.layer_norm(torch.cat([text, x], dim=1), text.shape[-1:])
        heads = self.qkv(both * (1 + scale) + shift).unflatten(-1, (12, -1)).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(*heads.chunk(3, dim=1))
        x = x + self.out(attended.transpose(1, 2).flatten(-2))[:, text.shape[1] :]
        return x + self.down(functional.gelu(self.up(x)))


def block() -> Model:
    model = Block().bfloat16().requires_grad_(False)

    def call(fast: Any, rows: int, columns: int, batch: int) -> torch.Tensor:
        tokens = torch.randn(batch, rows * columns + 7, 64, dtype=torch.bfloat16)
        x, text = tokens[:, 7:], tokens[:, :7]
        out: torch.Tensor = fast(x, text, text[:, 0])
        return out

    return model, call


def flux() -> Model:
    def call(fast: Any, rows: int, columns: int, batch: int) -> torch.Tensor:
        out: torch.Tensor = fast(**inputs(rows, columns, batch))[0]
        return out

    return tiny_flux(num_layers=1), call


def run(of: Model, backend: Counting, calls: int) -> list[int]:
    """Call at sizes drawn at random; returns the memory at every tenth of the calls."""
    model, call = of
    draw, fast, seen = random.Random(0), torch.compile(model, backend=backend), []
    order = [*SIZES, *(draw.choice(SIZES) for _ in range(calls - len(SIZES)))]
    with torch.no_grad():
        for i, (rows, columns, batch) in enumerate(order):
            assert call(fast, rows, columns, batch).shape[:2] == (batch, rows * columns)
            if i % (calls // 10) == calls // 10 - 1:
                seen.append(memory())
    return seen


# Dynamo takes half a minute for the graphs of a model of diffusers.
@pytest.mark.parametrize("make", [block, pytest.param(flux, marks=pytest.mark.zoo)])
def test_memory_stays_flat_and_compiles_as_few_as_without_omniq(make: Callable[[], Model]) -> None:
    gc.collect()
    held, of = resident_bytes(), make()
    base = Counting(plain)
    run(of, base, len(SIZES) * 3)
    torch._dynamo.reset()
    ours, before = Counting(quantized), statistics()["quantized"]
    seen = run(of, ours, 1000)
    assert 1 <= ours.graphs <= base.graphs
    # Every weight was quantized once, whatever the sizes.
    linears = sum(isinstance(m, torch.nn.Linear) for m in of[0].modules())
    assert 0 < statistics()["quantized"] - before <= linears
    assert resident_bytes() - held < 2 * sum(p.nbytes for p in of[0].parameters())
    # From half way on, by when every size has been seen many times.
    assert seen[-1] - seen[4] < 4 << 20
