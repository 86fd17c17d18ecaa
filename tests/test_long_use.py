"""Many calls at changing sizes: flat memory, and no more compiles than without omniq."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_flux import OPTIONS, inputs, tiny_flux

from omniq_compile.backend import omniq
from omniq_compile.weights import resident_bytes, statistics

SIZES = [
    (rows, columns, batch) for rows, columns in ((4, 5), (6, 6), (3, 8), (7, 4)) for batch in (1, 2)
]


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


def run(model: Any, backend: Counting, calls: int) -> list[int]:
    """Call at sizes drawn at random; returns the memory at every tenth of the calls."""
    draw, fast, seen = random.Random(0), torch.compile(model, backend=backend), []
    order = [*SIZES, *(draw.choice(SIZES) for _ in range(calls - len(SIZES)))]
    with torch.no_grad():
        for i, (rows, columns, batch) in enumerate(order):
            out = fast(**inputs(rows, columns, batch))[0]
            assert out.shape == (batch, rows * columns, 16)
            if i % (calls // 10) == calls // 10 - 1:
                seen.append(memory())
    return seen


@pytest.mark.parametrize("calls", [50, pytest.param(1000, marks=pytest.mark.zoo)])
def test_memory_stays_flat_and_compiles_as_few_as_without_omniq(calls: int) -> None:
    gc.collect()
    held, model = resident_bytes(), tiny_flux(num_layers=1)
    base = Counting(plain)
    run(model, base, len(SIZES) * 3)
    torch._dynamo.reset()
    ours, before = Counting(quantized), statistics()["quantized"]
    seen = run(model, ours, calls)
    assert 1 <= ours.graphs <= base.graphs
    # Every weight was quantized once, whatever the sizes.
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert 0 < statistics()["quantized"] - before <= linears
    assert resident_bytes() - held < 2 * sum(p.nbytes for p in model.parameters())
    # From half way on, by when every size has been seen many times.
    assert seen[-1] - seen[4] < 4 << 20
