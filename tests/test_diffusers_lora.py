"""LoRA through diffusers' own calls, on models and pipelines compiled before or after them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import error
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from tiny_flux import OPTIONS, inputs, tiny_flux

from omniq_compile import QuantizedTensor, compile, explain, quantize_

pytest.importorskip("peft")
RANK = 4
TARGETS = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.net.2")


def lora(model: Any, seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """A LoRA of the first block that moves the model's output by a good part."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for target in TARGETS:
        name = f"transformer_blocks.0.{target}"
        N, K = model.get_submodule(name).weight.shape
        for matrix, shape in {"lora_A": (RANK, K), "lora_B": (N, RANK)}.items():
            value = torch.randn(shape, generator=generator) * 0.3
            state[f"{prefix}{name}.{matrix}.weight"] = value.to(torch.bfloat16)
    return state


class Pair:
    """One model, run in BF16 as it stands and compiled, at each step of an adapter's life."""

    def __init__(self, model: Any, fast: Callable[..., Any]) -> None:
        self.model, self.fast, self.given = model, fast, inputs()
        self.seen: list[torch.Tensor] = []

    @torch.no_grad()
    def check(self, moved: bool) -> None:
        """The compiled model follows BF16; its output is new to it, or was seen before."""
        self.model.requires_grad_(False)  # peft turns gradients on
        expected = self.model(**self.given)[0]
        assert error(self.fast(**self.given)[0], expected) < 0.03
        near = [s for s in self.seen if error(expected, s) < 0.03]
        assert bool(near) is not moved
        self.seen.append(expected)


@pytest.mark.parametrize("compiled_first", [True, pytest.param(False, marks=pytest.mark.zoo)])
def test_every_step_of_an_adapters_life_is_followed(compiled_first: bool) -> None:
    model = tiny_flux()
    if not compiled_first:
        model.load_lora_adapter(lora(model, 3), prefix=None, adapter_name="early")
        model.requires_grad_(False)
    pair = Pair(model, torch.compile(model, backend="omniq", options=OPTIONS))
    pair.check(moved=True)
    model.load_lora_adapter(lora(tiny_flux(), 1), prefix=None, adapter_name="one")
    model.load_lora_adapter(lora(tiny_flux(), 2), prefix=None, adapter_name="two")
    model.set_adapters(["one"], weights=[1.0])
    pair.check(moved=True)
    model.set_adapters(["one", "two"], weights=[0.7, 0.9])
    pair.check(moved=True)
    model.fuse_lora(adapter_names=["one", "two"])
    pair.check(moved=False)
    model.unfuse_lora()
    pair.check(moved=False)
    model.unload_lora()
    pair.check(moved=not compiled_first)


@pytest.mark.parametrize("room", [8, 16])
def test_an_adapter_that_is_swapped_in_place_is_followed_without_a_new_compile(room: int) -> None:
    """Its matrices stay BF16 with room for rank 8, and with room for 16 are quantized."""
    model = tiny_flux(num_layers=1)
    model.enable_lora_hotswap(target_rank=room)
    model.load_lora_adapter(lora(model, 1), prefix=None, adapter_name="one")
    pair = Pair(model, torch.compile(model, backend="omniq", options=OPTIONS))
    pair.check(moved=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, moved in ((2, True), (1, False)):
            state = lora(tiny_flux(num_layers=1), seed)
            model.load_lora_adapter(state, prefix=None, adapter_name="one", hotswap=True)
            pair.check(moved)


def test_small_matrices_of_an_adapter_stay_bf16_and_the_layer_does_not() -> None:
    model = tiny_flux(num_layers=1)
    model.load_lora_adapter(lora(model, 1), prefix=None, adapter_name="one")
    model.requires_grad_(False)
    report = explain(model, inputs(), OPTIONS, stages=())
    reasons = {s.layer: s.decision.reason for s in report.kept if "lora" in s.layer}
    names = [f"transformer_blocks.0.{t}" for t in TARGETS]
    assert reasons == {
        f"{name}.{matrix}.one": f"{size} = {RANK} is under min_features = 16"
        for name in names
        for matrix, size in (("lora_A", "N"), ("lora_B", "K"))
    }
    assert set(names) <= {s.layer for s in report.rewritten}


@pytest.mark.parametrize("adapter_first", [False, True])
def test_an_ignored_layer_stays_ignored_when_an_adapter_comes_or_goes(
    adapter_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_flux()

    def load() -> None:
        model.load_lora_adapter(lora(tiny_flux(), 1), prefix=None, adapter_name="one")
        model.requires_grad_(False)

    if adapter_first:
        load()
    compile(model, OPTIONS | {"ignored_layers": ["attn.to_q", r"re:.*\.add_k_proj"]})
    for change in (None, model.unload_lora if adapter_first else load):
        if change is not None:
            change()
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "omniq"):
            model(**inputs())
        logged = {r.args[0]: r.args[2] for r in caplog.records if r.msg.startswith("kept %s")}
        assert {"attn.to_q", "attn.add_k_proj"} <= {
            n for n, why in logged.items() if "ignored" in why
        }
        assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_layer_under_an_adapter_is_ignored_while_weights_are_stored() -> None:
    model = tiny_flux()
    model.load_lora_adapter(lora(tiny_flux(), 1), prefix=None, adapter_name="one")
    quantize_(model, OPTIONS | {"ignored_layers": [r"re:.*\.add_k_proj"]})
    attention: Any = model.transformer_blocks[0].attn
    assert type(attention.to_q.base_layer.weight) is QuantizedTensor
    assert type(attention.add_k_proj.base_layer.weight) is not QuantizedTensor


def test_a_pipelines_lora_is_followed_by_its_compiled_transformer() -> None:
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, tiny_flux(num_layers=1)
    )
    pipe.set_progress_bar_config(disable=True)
    given = {
        "prompt_embeds": inputs()["encoder_hidden_states"],
        "pooled_prompt_embeds": inputs()["pooled_projections"],
        "height": 64, "width": 80, "num_inference_steps": 2, "output_type": "latent",
    }  # fmt: skip
    slow = pipe.transformer

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        latents: torch.Tensor = pipe(**given, generator=generator, return_dict=False)[0]
        return latents

    expected = {"plain": draw()}
    pipe.load_lora_weights(lora(slow, 1, "transformer."), adapter_name="one")
    slow.requires_grad_(False)
    expected["one"] = draw()
    pipe.unload_lora_weights()
    assert error(expected["one"], expected["plain"]) > 0.1
    slow.compile(backend="omniq", options=OPTIONS)
    assert 0 < error(draw(), expected["plain"]) < 0.03
    pipe.load_lora_weights(lora(slow, 1, "transformer."), adapter_name="one")
    slow.requires_grad_(False)
    assert 0 < error(draw(), expected["one"]) < 0.03
    pipe.fuse_lora()
    slow.requires_grad_(False)
    assert 0 < error(draw(), expected["one"]) < 0.03
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    slow.requires_grad_(False)
    assert 0 < error(draw(), expected["plain"]) < 0.03
    # What torch.compile returns is passed over, as docs/diffusers.md says.
    pipe.load_lora_weights(lora(slow, 1, "transformer."), adapter_name="one")
    pipe.transformer = torch.compile(slow, backend="omniq", options=OPTIONS)
    with pytest.raises(ValueError, match="not in the list of present adapters"):
        pipe.set_adapters(["one"])
    pipe.unload_lora_weights()
    assert set(slow.peft_config) == {"one"}


@torch.no_grad()
def test_an_adapter_on_stored_codes_is_followed_and_fused_into_them() -> None:
    """Fusing writes new codes, and unfusing others again: each costs one more rounding."""
    model = tiny_flux(num_layers=1)
    plain = model(**inputs())[0]
    quantize_(model, OPTIONS)
    fast = torch.compile(model, backend="omniq", options=OPTIONS)
    model.load_lora_adapter(lora(tiny_flux(), 1), prefix=None, adapter_name="one")
    model.requires_grad_(False)
    adapted = model(**inputs())[0]
    assert error(adapted, plain) > 0.1
    assert error(fast(**inputs())[0], adapted) < 0.03
    model.fuse_lora()
    model.requires_grad_(False)
    assert error(fast(**inputs())[0], adapted) < 0.05
    model.unfuse_lora()
    model.unload_lora()
    assert error(fast(**inputs())[0], plain) < 0.05
