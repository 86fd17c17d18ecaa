"""Models whose weights diffusers or accelerate moves between calls."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from conftest import error
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.hooks import apply_group_offloading
from tiny_flux import OPTIONS, inputs, tiny_flux
from torch import nn

from omniq_compile import WeightError, compile, explain, quantize_
from omniq_compile.pipelines.call import compile_component


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="omniq", options=OPTIONS)


OFFLOADS: dict[str, dict[str, Any]] = {
    "leaf level": {"offload_type": "leaf_level"},
    "block level": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "to disk": {"offload_type": "leaf_level", "offload_to_disk_path": "folder"},
}


@pytest.mark.parametrize("name", OFFLOADS)
@torch.no_grad()
def test_group_offloading_is_followed(name: str, tmp_path: Path) -> None:
    model, given = tiny_flux(), inputs()
    expected = model(**given)[0]
    options = dict(OFFLOADS[name])
    if "offload_to_disk_path" in options:
        options["offload_to_disk_path"] = str(tmp_path)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
    fast = compiled(model)
    for _ in range(2):
        assert 0 < error(fast(**given)[0], expected) < 0.03


def test_a_pipelines_cpu_offload_is_followed_or_refused() -> None:
    """Without an accelerator diffusers refuses it itself; its hooks are run here on the CPU."""
    from accelerate import cpu_offload_with_hook

    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, tiny_flux(num_layers=1)
    )
    if not torch.accelerator.is_available():
        with pytest.raises(RuntimeError, match="accelerator"):
            pipe.enable_model_cpu_offload()
    model, given = pipe.transformer, inputs()
    with torch.no_grad():
        expected = model(**given)[0]
        model, hook = cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
        fast = compiled(model)
        for _ in range(2):
            assert 0 < error(fast(**given)[0], expected) < 0.03
            hook.offload()


@pytest.mark.parametrize(
    "compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.zoo)]
)
@torch.no_grad()
def test_a_stored_model_can_be_moved_after_it_was_compiled(compiler: str) -> None:
    """`Module.to` refuses weights that a kept graph still refers to."""
    model, given = tiny_flux(num_layers=1), inputs()
    quantize_(model, OPTIONS)
    expected = model(**given)[0]
    fast = torch.compile(model, backend="omniq", options={**OPTIONS, "compiler": compiler})
    first = fast(**given)[0]
    assert 0 < error(first, expected) < 0.03
    model.to("cpu")
    assert torch.equal(fast(**given)[0], first)
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


@pytest.mark.parametrize("how", ["by blocks", "as generate does", "explained"])
@torch.no_grad()
def test_a_stored_model_can_be_moved_whatever_traced_it(how: str) -> None:
    blocks = 1 if how == "as generate does" else 2  # generate compiles repeated blocks alone
    model, x = nn.Sequential(*(Residual() for _ in range(blocks))), torch.randn(5, 64)
    quantize_(model, OPTIONS)
    expected = model(x)
    report = None
    if how == "by blocks":
        compile(model, OPTIONS)
    elif how == "as generate does":
        compile_component(model, OPTIONS)
    else:
        report = explain(model, x, OPTIONS)
        assert len(report.rewritten) == blocks
    assert error(model(x), expected) < 0.03
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


@torch.no_grad()
def test_what_dynamo_leaves_behind_does_not_stop_a_move() -> None:
    """A weak reference in a cycle that nothing reaches, as Dynamo's guards hold them."""

    class Guard:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.itself, self.seen = self, weakref.ref(tensor)

    model = tiny_flux()
    quantize_(model, OPTIONS)
    gc.disable()
    try:
        for parameter in model.transformer_blocks.parameters():
            Guard(parameter)
        model.transformer_blocks.to("meta")
    finally:
        gc.enable()


@pytest.mark.parametrize("by_blocks", [True, False])
@torch.no_grad()
def test_stored_weights_are_group_offloaded(by_blocks: bool) -> None:
    model, given = tiny_flux(), inputs()
    quantize_(model, OPTIONS)
    expected = model(**given)[0]
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    if by_blocks:
        model.compile_repeated_blocks(backend="omniq", options=OPTIONS)
        fast = model
    else:
        fast = compiled(model)
    for _ in range(2):
        assert 0 < error(fast(**given)[0], expected) < 0.03


@pytest.mark.parametrize(("limit", "compiled_layers"), [(8, 8), (64, 10)])
@torch.no_grad()
def test_hooks_on_layers_want_more_recompilations(
    limit: int, compiled_layers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What follows diffusers' hook is one function for all layers, each a kind of its own here."""
    model = nn.Sequential(*(nn.Linear(32 + 8 * n, 40 + 8 * n) for n in range(10)))
    model.requires_grad_(False)
    x, cpu = torch.randn(5, 32), torch.device("cpu")
    expected = model(x)
    apply_group_offloading(model, cpu, cpu, offload_type="leaf_level")
    fast = compiled(model)
    with torch._dynamo.config.patch(recompile_limit=limit), caplog.at_level("INFO", "omniq"):
        assert 0 < error(fast(x), expected) < 0.05
    assert sum("1 sites: 1 int8" in message for message in caplog.messages) == compiled_layers


@pytest.mark.parametrize("stored", [True, False])
@torch.no_grad()
def test_sequential_offloading_is_followed(stored: bool) -> None:
    """accelerate makes parameters anew in each call, and stored ones as no `nn.Parameter`."""
    model = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 64)).requires_grad_(False)
    x = torch.randn(5, 64)
    if stored:
        quantize_(model, OPTIONS)
    expected = model(x)
    accelerate.cpu_offload(model, torch.device("cpu"))
    fast = compiled(model)
    for _ in range(2):
        assert 0 < error(fast(x), expected) < 0.03


def test_casting_what_is_stored_quantized_says_to_leave_it_out() -> None:
    model = tiny_flux()
    quantize_(model, OPTIONS)
    with pytest.raises(WeightError, match=r"leave enable_layerwise_casting\(\) out"):
        model.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
        )
