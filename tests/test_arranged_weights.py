"""Weights whose kernel reads them in a layout of its own, on a CPU kernel that is given one."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import omniq_compile as omniq
from omniq_compile import QuantConfig
from omniq_compile.compiling import weights
from omniq_compile.compiling.weights import resident_bytes
from omniq_compile.lowering import registry
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.target import detect
from omniq_compile.quality.switches import Switches

OPTIONS = {"method": "int8", "min_features": 1, "compiler": "aot_eager"}
K, HIDDEN, N = 96, 160, 64

calls: list[torch.Size] = []


def reversed_scales(parts: Parts) -> Parts:
    codes, scale = parts
    if type(scale) is torch.Tensor:  # and not one that is traced
        calls.append(codes.shape)
    return codes, scale.flip(0)


def reversed_rows(parts: Parts) -> Parts:
    codes, scale = reversed_scales(parts)
    return codes.flip(0), scale


def undone(parts: Parts, rows: bool) -> Parts:
    codes, scale = parts
    return codes.flip(0) if rows else codes, scale.flip(0)


Change = Callable[[Callable[[Parts], Parts]], None]


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> Change:
    """Give every int8 kernel of this CPU a layout: anything but arranged once comes out wrong."""

    def change(arrange: Callable[[Parts], Parts]) -> None:
        def changed(kernel: registry.Kernel) -> registry.Kernel:
            def gemm(a: Any, b: Parts, *rest: Any) -> torch.Tensor:
                return kernel.gemm(a, undone(b, arrange is reversed_rows), *rest)

            return dataclasses.replace(kernel, gemm=gemm, arrange=arrange)

        rows = tuple(map(changed, registry.candidates("int8", detect("cpu"))))
        monkeypatch.setattr(registry, "kernels_of", lambda device: rows)

    return change


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    calls.clear()
    with torch.no_grad():
        yield


def weight(rows: int, columns: int) -> torch.Tensor:
    """Draw one whose rows have scales that differ."""
    return torch.randn(rows, columns) * torch.logspace(-1, 0, rows).unsqueeze(1)


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(K, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, N)).bfloat16()
    for layer in net[::2]:
        layer.weight.copy_(weight(*layer.weight.shape))
    return net


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((actual - expected).float().norm() / expected.float().norm()) < 0.03


def compiled(module: nn.Module, **options: Any) -> Any:
    return torch.compile(module, backend="omniq", options=OPTIONS | options)


def test_a_weight_that_is_read_as_it_is_stored_is_not_compared_in_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever its parts are by now is what the graph gets."""

    def stamp(source: torch.Tensor) -> Any:
        raise AssertionError(f"followed: {source.shape}")

    net, x = model(), torch.randn(5, K).bfloat16()
    omniq.quantize_(net, OPTIONS)
    monkeypatch.setattr(weights, "Stamp", stamp)
    run = compiled(net)
    for factor in (1, -3):
        net[2].weight.mul_(factor)
        assert near(run(x), net(x))


@pytest.mark.parametrize("arrange", [reversed_scales, reversed_rows])
def test_a_weight_is_arranged_once_until_it_changes(
    layout: Change, arrange: Callable[[Parts], Parts]
) -> None:
    layout(arrange)
    net, x = model(), torch.randn(2, 7, K).bfloat16()
    run = compiled(net)
    for _ in range(3):
        assert near(run(x), net(x))
    assert calls == [(HIDDEN, K), (N, HIDDEN)]
    net[2].weight.copy_(weight(N, HIDDEN))
    for _ in range(2):
        assert near(run(x), net(x))
    assert calls == [(HIDDEN, K), (N, HIDDEN), (N, HIDDEN)]


def held() -> int:
    """Return the bytes that are held, without those of tests before."""
    torch._dynamo.reset()
    gc.collect()
    return resident_bytes()


def run_stored() -> tuple[nn.Module, Any, torch.Tensor]:
    """Run a model that is stored quantized three times; returns it, compiled too, and its input."""
    net, x = model(), torch.randn(2, 7, K).bfloat16()
    expected = net(x)
    omniq.quantize_(net, {"method": "int8", "min_features": 1})
    run = compiled(net)
    for _ in range(3):
        assert near(run(x), expected)
    return net, run, x


def test_scales_of_a_stored_weight_are_held_twice(layout: Change) -> None:
    layout(reversed_scales)
    before = held()
    net, run, x = run_stored()
    assert calls == [(HIDDEN, K), (N, HIDDEN)]
    assert resident_bytes() - before == 4 * (HIDDEN + N)

    other = model()
    expected = other(x)
    omniq.quantize_(other, {"method": "int8", "min_features": 1})
    net.load_state_dict(other.state_dict())
    assert near(run(x), expected)
    assert len(calls) == 4
    net[2].weight.scale.mul_(2)
    assert near(run(x), net(x))
    del net, run, other
    assert held() == before


def test_a_stored_weight_is_not_decoded_to_be_compared(
    layout: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout(reversed_scales)
    net, run, x = run_stored()
    expected = net(x)

    def dequantize(*_: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr(omniq.QuantizedTensor, "dequantize", dequantize)
    assert near(run(x), expected)


def test_codes_of_a_stored_weight_are_not_held_twice(layout: Change) -> None:
    layout(reversed_rows)
    before = held()
    net, _, x = run_stored()
    assert resident_bytes() == before
    lowered = omniq.explain(net, [x], OPTIONS).graphs[0].programs["lowered"]
    assert "its kernel reads" not in lowered
    assert lowered.count("_codes.flip(0)") == 2


def test_a_layer_that_tune_switches_on_is_arranged_once(layout: Change) -> None:
    layout(reversed_scales)
    net = model()
    switches = Switches(net, QuantConfig.from_options(OPTIONS))
    for tokens in (3, 8, 3):
        x = torch.randn(tokens, K).bfloat16()
        expected = net(x)
        with switches.on(switches.names):
            assert near(net(x), expected)
    assert calls == [(HIDDEN, K), (N, HIDDEN)]


def test_inputs_say_that_they_are_arranged(layout: Change) -> None:
    layout(reversed_rows)
    lowered = omniq.explain(model(), [torch.randn(3, K).bfloat16()], OPTIONS).graphs[0].programs
    assert lowered["lowered"].count("as its kernel reads it") == 4
    assert lowered["quantized"].count("as its kernel reads it") == 0


@pytest.fixture
def _two_layouts(layout: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let products of under 5 rows read a weight as it is stored, and others reversed."""
    layout(reversed_rows)
    (changed, *_), plain = registry.kernels_of("cpu"), registry.as_stored
    few = dataclasses.replace(
        changed,
        gemm=lambda a, b, *rest: changed.gemm(a, reversed_rows(b), *rest),
        arrange=plain,
        refuse=lambda problem, scheme: None if problem.M < 5 else "many rows",
    )
    monkeypatch.setattr(registry, "kernels_of", lambda device: (few, changed))


@pytest.mark.usefixtures("_two_layouts")
def test_two_graphs_read_one_weight_in_a_layout_each() -> None:
    net = model()
    run = torch.compile(net, backend="omniq", options=OPTIONS, dynamic=False)
    for rows in (3, 9, 3):
        x = torch.randn(rows, K).bfloat16()
        assert near(run(x), net(x))


@pytest.mark.usefixtures("_two_layouts")
def test_a_weight_that_two_kernels_read_stays_as_it_is() -> None:
    layer = nn.Linear(K, N, bias=False).bfloat16()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.layer(x), self.layer(x[:3] * 2)

    x = torch.randn(9, K).bfloat16()
    net = Twice()
    run = compiled(net)
    for actual, expected in zip(run(x), net(x), strict=True):
        assert near(actual, expected)
    lowered = omniq.explain(net, [x], OPTIONS).graphs[0].programs["lowered"]
    assert "its kernel reads" not in lowered
