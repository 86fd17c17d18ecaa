"""What of a model stays in float32 is the same in any graph of it, whole or by blocks."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import OPTIONS, sites
from torch import nn

import omniq_compile
from omniq_compile import explain, quantize_

WIDTH = 32


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.to(self.proj.weight.dtype)).to(x.dtype)


class Refiner(Cast):
    """A class of blocks of its own, in float32."""

    def __init__(self) -> None:
        super().__init__(torch.float32)


class Refined(nn.Module):
    def __init__(self, head: bool = False) -> None:
        super().__init__()
        self.refiners = nn.ModuleList([Refiner(), Refiner()])
        self.blocks = nn.ModuleList([Cast(), Cast()])
        self.head = Refiner() if head else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.refiners, *self.blocks):
            x = block(x)
        if self.head is None:
            return x
        torch._dynamo.graph_break()
        return self.head(x)


def counted(model: nn.Module, caplog: pytest.LogCaptureFixture) -> int:
    """Return how many layers of a compiled model are rewritten."""
    with caplog.at_level(logging.INFO, logger="omniq"), torch.no_grad():
        model(torch.randn(4, WIDTH).bfloat16())
    lines = [record.getMessage() for record in caplog.records if " sites: " in record.getMessage()]
    return sum(int(line.split(" sites: ")[1].split()[0]) for line in lines if "int8" in line)


def test_blocks_in_float32_are_kept_beside_others_as_in_the_whole_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Refined().eval().requires_grad_(False)
    names = {"refiners.0.proj": True, "refiners.1.proj": True}
    expected = names | {"blocks.0.proj": False, "blocks.1.proj": False}
    found = sites(model, torch.randn(4, WIDTH).bfloat16())
    assert {site.layer: site.decision.method is None for site in found} == expected
    rows = quantize_(Refined(), OPTIONS)
    assert {row.layer: row.method is None for row in rows} == expected
    assert counted(omniq_compile.compile(model, OPTIONS), caplog) == 1


def test_repeated_blocks_of_diffusers_do_so_too(caplog: pytest.LogCaptureFixture) -> None:
    model = Refined().eval().requires_grad_(False)
    for block in (*model.refiners, *model.blocks):
        block.compile(backend="omniq", options=OPTIONS)
    assert counted(model, caplog) == 1


def test_what_is_the_only_one_of_its_class_is_no_block(caplog: pytest.LogCaptureFixture) -> None:
    """As a float32 model in a list of others, which say nothing of what it computes in."""
    models = nn.Sequential(Refiner(), Cast()).eval().requires_grad_(False)
    models[0].compile(backend="omniq", options=OPTIONS)
    assert counted(models, caplog) == 1


def test_a_float32_layer_behind_a_break_is_kept() -> None:
    model = Refined(head=True).eval().requires_grad_(False)
    found = sites(model, torch.randn(4, WIDTH).bfloat16())
    assert {site.layer: site.decision.method for site in found if site.dtype == "float32"} == {
        "refiners.0.proj": None, "refiners.1.proj": None, "head.proj": None,
    }  # fmt: skip


def test_a_model_in_float32_is_quantized_whatever_holds_it() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
            self.net = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

        def sample(self) -> bool:
            compiled = torch.compile(self.net, backend="omniq", options=OPTIONS)
            x = torch.randn(4, WIDTH)
            with torch.no_grad():
                return torch.equal(compiled(x), self.net(x))

    assert not Pair().sample()


def test_a_part_outside_autocast_is_kept_behind_a_break() -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(WIDTH, WIDTH), Refiner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.body(x)
            torch._dynamo.graph_break()
            return self.head(x.float())

    model = Autocast().eval().requires_grad_(False)
    found = sites(model, torch.randn(4, WIDTH))
    assert [(s.layer, s.decision.method) for s in found] == [("body", "int8"), ("head.proj", None)]


def test_only_a_cast_that_a_later_call_makes_too_keeps_what_is_in_float32() -> None:
    def is_quantized(model: nn.Module, autocast: bool = False) -> bool:
        x = torch.randn(4, WIDTH).to(next(model.parameters()).dtype)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="omniq", options=OPTIONS)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return not torch.equal(compiled(x), model(x))

    stored = nn.Linear(WIDTH, WIDTH).bfloat16().requires_grad_(False)
    assert is_quantized(stored)
    assert is_quantized(stored.float())
    called = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    assert is_quantized(called, autocast=True)
    assert is_quantized(called)
    explained = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        explain(explained, torch.randn(4, WIDTH), OPTIONS)
    assert is_quantized(explained)


@pytest.mark.parametrize("by", ["autocast", "hand"])
def test_what_casts_itself_keeps_the_rest_in_float32_in_a_later_graph(by: str) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if by == "hand":
                x = nn.functional.linear(x.bfloat16(), self.body.weight.bfloat16())
            else:
                with torch.autocast("cpu", torch.bfloat16):
                    x = self.body(x)
            torch._dynamo.graph_break()
            return self.head(x.float())

    model = Cast().requires_grad_(False)
    heads = []
    model.head.register_forward_hook(lambda module, args, result: heads.append((args[0], result)))
    with torch.no_grad():
        torch.compile(model, backend="omniq", options=OPTIONS)(torch.randn(4, WIDTH))
        ((x, result),) = heads
        assert torch.equal(result, nn.functional.linear(x, model.head.weight, model.head.bias))
