"""What a graph writes to its weights is seen, through views and other inputs in the same memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS, compiled, error, sites
from torch import nn

import omniq_compile as omniq

COMPILERS = ("eager", "aot_eager", "inductor")

by_compiler = pytest.mark.parametrize("compiler", COMPILERS)


def run(model: nn.Module, x: torch.Tensor, compiler: str, calls: int = 1) -> torch.Tensor:
    """Return the result of the last of some calls."""
    fast = torch.compile(model, backend="omniq", options=OPTIONS | {"compiler": compiler})
    with torch.no_grad():
        for _ in range(calls):
            y: torch.Tensor = fast(x)
    return y


class Cached(nn.Module):
    """Writes to a part of a cache by a name of its own, and multiplies with the part."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.randn(2, 38, 57))
        self.register_buffer("first", self.cache[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first.copy_(x[:38] * 3)
        return F.linear(x, self.cache[0])


@by_compiler
def test_a_weight_written_through_another_input_is_kept(compiler: str) -> None:
    model, x = Cached(), torch.randn(45, 57)
    expected = x @ (x[:38] * 3).t()
    torch.testing.assert_close(run(model, x, compiler), expected)
    (site,) = sites(Cached(), x)
    assert site.decision.reason == "the graph changes its weight in place"


def test_a_weight_beside_one_that_is_written_is_rewritten() -> None:
    """The memory of other buffers of the same model is none of its business."""
    model = Cached()
    model.forward = lambda x: F.linear(x, model.other) + model.first.mul_(2).sum()  # type: ignore[method-assign]
    model.register_buffer("other", torch.randn(38, 57))
    (site,) = sites(model, torch.randn(7, 57))
    assert site.decision.method == "int8"


@by_compiler
@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_parameters_joined_into_out_are_written(compiler: str, join: Callable[..., Any]) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Parameter(torch.randn(19, 57)) for _ in range(2))
            joined = join([torch.zeros(19, 57)] * 2)
            self.register_buffer("buffer", joined)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            join([self.one, self.two], out=self.buffer)
            return F.linear(x, self.buffer.view(38, 57))

    model, x = Joined().requires_grad_(False), torch.randn(7, 57)
    expected = torch.cat([x @ model.one.t(), x @ model.two.t()], dim=1)
    torch.testing.assert_close(run(model, x, compiler), expected)
    assert torch.equal(model.buffer.view(38, 57), torch.cat([model.one, model.two]))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_a_norm_writes_to_the_statistics_that_it_keeps(norm: Any) -> None:
    """And not to what it normalises: the layer before it is rewritten."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(57, 38), norm(38, track_running_stats=True)
            self.weight = nn.Parameter(torch.randn(19, 38))

        def forward(self, x: torch.Tensor) -> Any:
            y = self.norm(self.layer(x).transpose(1, 2))
            return F.linear(y.transpose(1, 2), self.weight * self.norm.running_var)

    model, x = Kept().requires_grad_(False), 3 * torch.randn(5, 7, 57)
    before, after = sites(copy.deepcopy(model), x)
    assert before.decision.method == "int8"
    assert after.decision.reason == "the graph changes its weight in place"
    expected = copy.deepcopy(model)(x)
    assert error(run(model, x, "eager"), expected) < 0.02


# What a model does to its weight w [38, 57] in each call, before it multiplies with it.
WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "whole": lambda w: w.mul_(1.25),
    "copied": lambda w: w.copy_(w * 1.25),
    "row": lambda w: w[0].mul_(1.25),
    "rows": lambda w: w[:5].add_(0.125),
    "two views": lambda w: (w[0].mul_(1.25), w[:5].add_(0.125)),
    "transposed": lambda w: w.t().mul_(1.25),
    "flat": lambda w: w.view(-1)[:70].mul_(1.25),
    "diagonal": lambda w: w.diagonal().add_(0.125),
    "item": lambda w: w.__setitem__(3, 0.125),
    "data": lambda w: w.data.mul_(1.25),
    "row of data": lambda w: w.data[0].mul_(1.25),
    "iadd": lambda w: w.__iadd__(0.125),
    "out": lambda w: torch.mul(w, 1.25, out=w),
}


class Written(nn.Module):
    def __init__(self, write: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(57, 38)
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.write(self.linear.weight)
        return F.silu(self.linear(x))


def compilers(name: str) -> list[str]:
    return [c for c in COMPILERS if c != "inductor" or name in ("row", "two views")]


@pytest.mark.parametrize(("name", "compiler"), [(n, c) for n in WRITES for c in compilers(n)])
@pytest.mark.parametrize("stored", [False, True])
def test_a_weight_that_each_call_writes_to(name: str, compiler: str, stored: bool) -> None:
    plain = Written(WRITES[name]).requires_grad_(False)
    model, x = copy.deepcopy(plain), torch.randn(7, 57)
    if stored:
        omniq.quantize_(model, OPTIONS)
    with torch.no_grad():
        for _ in range(3):
            expected = plain(x)
    actual = run(model, x, compiler, calls=3)
    weight: Any = model.linear.weight
    if not stored:
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(weight, plain.linear.weight)
        return
    # Codes of eight bits, rounded four times.
    assert error(actual, expected) < 0.015
    assert error(weight.dequantize(), plain.linear.weight) < 0.015
    assert isinstance(weight, omniq.QuantizedTensor)


def test_a_stored_weight_that_is_only_read_keeps_its_bits() -> None:
    """Also where others are written to: what it is added to, and the result of its layer."""

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(57, 38)
            self.register_buffer("sums", torch.zeros(57))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.sums.add_(self.linear.weight[0])
            return self.linear(x).relu_().mul_(2)

    model = Read().requires_grad_(False)
    omniq.quantize_(model, OPTIONS)
    before = [part.clone() for part in model.linear.weight.parts]
    row, x = model.linear.weight.dequantize()[0], torch.randn(7, 57)
    (site,) = sites(model, x)
    assert site.decision.method == "int8"
    torch.compiler.reset()
    model.sums.zero_()
    actual = run(model, x, "aot_eager", calls=2)
    assert all(map(torch.equal, model.linear.weight.parts, before))
    torch.testing.assert_close(model.sums, row * 2)
    assert (
        error(actual, F.linear(x, model.linear.weight.dequantize(), model.linear.bias).relu() * 2)
        < 0.01
    )


def test_a_sparse_input_has_no_memory_to_compare() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(57, 38)
            self.register_buffer("mask", torch.eye(7).to_sparse_csr())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mask @ self.linear(x)

    model, x = Sparse().requires_grad_(False), torch.randn(7, 57)
    assert error(compiled(model)(x), model(x)) < 0.02
