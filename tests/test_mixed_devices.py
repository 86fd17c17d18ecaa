"""Graphs with tensors on more than one device: each kernel is given those of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional

import omniq_compile as omniq
from omniq_compile.backend import run_target
from omniq_compile.inspector import absent_gpu
from omniq_compile.lowering import target
from omniq_compile.lowering.target import Target
from omniq_compile.passes import dynamo, pipeline
from omniq_compile.passes.context import Context
from omniq_compile.passes.sites import Site

BF16 = torch.bfloat16


class Both(nn.Module):
    """One layer on the CPU, and one on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96, dtype=BF16)
        self.second = nn.Linear(96, 64, dtype=BF16, device="cuda")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x).to("cuda"))
        return out


class MovedResult(nn.Module):
    """Its one product is on the CPU, and only what comes of it on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 96, dtype=BF16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x).to("cuda")
        return out


class Moved(nn.Module):
    """All inputs of the graph are on the CPU, and its product is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 96, dtype=BF16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.layer.weight.to("cuda"), self.layer.bias.to("cuda")
        return functional.linear(x.to("cuda"), weight, bias)


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Site]]:
    """Decide the sites of a model that is on a GPU in part, as on a machine that has an H200."""
    pytest.importorskip("triton")
    hopper = Target.parse("cuda:sm_90")
    if (why := absent_gpu.why_not(hopper)) is not None:
        pytest.skip(why)
    monkeypatch.setitem(target._DETECT, "cuda", lambda index: hopper)

    def decide(kind: type[nn.Module], **options: Any) -> list[Site]:
        config = omniq.QuantConfig("fp8", min_features=1, **options)
        contexts = []

        def record(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            context = Context(config, run_target(config, dynamo.devices(gm.graph)), stages={})
            pipeline.run(gm, context)
            contexts.append(context)
            return gm.forward

        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model = kind().requires_grad_(False)
            torch.compile(model, backend=record)(torch.empty(40, 64, dtype=BF16))
        (context,) = contexts
        assert context.target == hopper
        return context.sites

    return decide


def test_a_layer_on_another_device_is_kept(decided: Callable[..., list[Site]]) -> None:
    first, second = decided(Both)
    assert first.decision.method is None
    assert first.decision.reason == "it is on 'cpu', and this graph is compiled for 'cuda:sm_90'"
    assert second.decision.kernel is not None
    assert second.decision.kernel.device == "cuda"


def test_a_layer_is_kept_where_no_product_is_on_the_device_of_the_graph(
    decided: Callable[..., list[Site]],
) -> None:
    (site,) = decided(MovedResult)
    assert site.decision.kernel is None
    assert site.decision.reason == "it is on 'cpu', and this graph is compiled for 'cuda:sm_90'"


def test_a_product_is_on_the_device_that_it_is_moved_to(
    decided: Callable[..., list[Site]],
) -> None:
    (site,) = decided(Moved, matmul=True)
    assert site.decision.kernel is None or site.decision.kernel.device == "cuda"


def test_operators_of_the_cpu_take_tensors_of_the_cpu_alone() -> None:
    """They read the memory that a tensor's address names."""
    x = torch.randn(3, 64, device="meta")
    # Without values they are traced; what runs is registered for the CPU.
    assert torch.ops.omniq.cpu_quantize_activation_scaled(x, "fp8")[0].is_meta
    for name in ("cpu_quantize_activation", "cpu_quantize_activation_scaled", "cpu_tile_gemm"):
        has = [
            key
            for key in ("CPU", "CUDA", "XPU", "CompositeExplicitAutograd")
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"omniq::{name}", key)
        ]
        assert has == ["CPU"]
