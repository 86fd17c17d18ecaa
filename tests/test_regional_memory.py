"""What `omniq_compile.compile` holds goes with the model, and with the options before."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import omniq_compile
from omniq_compile.compiling.weights import BoundWeights, resident_bytes

OPTIONS = {"min_features": 1, "compiler": "eager"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def compiled_graphs() -> int:
    gc.collect()
    return sum(type(thing) is BoundWeights for thing in gc.get_objects())


def test_compiling_anew_frees_the_weights_of_before() -> None:
    model, x = Tower(), torch.randn(7, 64)
    gc.collect()
    before, held = resident_bytes(), []
    for method in ("int8", "fp8", "int8"):
        omniq_compile.compile(model, OPTIONS | {"method": method})
        model(x)
        gc.collect()
        held.append(resident_bytes() - before)
    assert held[0] == held[1] == held[2] > 0


def test_what_was_compiled_for_a_hook_goes_with_it() -> None:
    model, x = Tower(), torch.randn(7, 64)
    omniq_compile.compile(model, OPTIONS | {"method": "int8"})
    model(x)
    before = compiled_graphs()
    for _ in range(3):
        hook = model.blocks[1].register_forward_hook(lambda block, args, out: out * 2)
        model(x)
        assert compiled_graphs() == before + 1
        hook.remove()
        model(x)
        assert compiled_graphs() == before


@pytest.mark.parametrize("ran", [False, True])
def test_a_deleted_model_is_freed_at_once(ran: bool) -> None:
    model, x = Tower(), torch.randn(7, 64)
    omniq_compile.compile(model, OPTIONS | {"method": "int8"})
    gc.collect()
    before = resident_bytes()
    gc.disable()
    try:
        if ran:
            model(x)
            assert resident_bytes() > before
        gone = weakref.ref(model), *map(weakref.ref, model.parameters())
        del model
        assert not any(reference() is not None for reference in gone)
        assert resident_bytes() == before
    finally:
        gc.enable()
