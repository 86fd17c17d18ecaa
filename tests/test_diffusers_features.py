"""What diffusers does to a model beside calling it: attention, guidance, caches, casting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from tiny_flux import OPTIONS, inputs, tiny_flux

import omniq_compile as omniq


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="omniq", options=OPTIONS | options)


class Halved(FluxAttnProcessor):
    """A processor of a user's own: attention counts half."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        return tuple(0.5 * r for r in result) if isinstance(result, tuple) else 0.5 * result


CHANGES: dict[str, Callable[[Any], Any]] = {
    "processor": lambda model: model.set_attn_processor(Halved()),
    "backend": lambda model: model.set_attention_backend("_native_math"),
    "fused projections": lambda model: model.fuse_qkv_projections(),
    "layerwise casting": lambda model: model.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
    ),
}


@pytest.fixture(autouse=True)
def _one_models_attention() -> Iterator[None]:
    """Put the backend back that `set_attention_backend` chooses for the whole process."""
    with attention_backend("native"):
        yield


# A model that is compiled before its change is compiled once more after it, as the other is.
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("compiled_first", [True, pytest.param(False, marks=pytest.mark.zoo)])
@torch.no_grad()
def test_a_change_of_the_model_is_followed(name: str, compiled_first: bool) -> None:
    model, given = tiny_flux(num_layers=1), inputs()
    fast = compiled(model)
    if compiled_first:
        before = model(**given)[0]
        assert 0 < error(fast(**given)[0], before) < 0.03
    CHANGES[name](model)
    expected = model(**given)[0]
    assert 0 < error(fast(**given)[0], expected) < 0.03


@torch.no_grad()
def test_samples_of_a_guidance_batch_are_what_they_are_alone() -> None:
    fast, both = compiled(tiny_flux(num_layers=1)), inputs(batch=2)
    together = fast(**both)[0]
    for i in range(2):
        alone = {
            name: value[i : i + 1]
            if isinstance(value, torch.Tensor) and "ids" not in name
            else value
            for name, value in both.items()
        }
        # Scales are per token; only the order of BF16 sums in attention may differ.
        assert error(fast(**alone)[0], together[i : i + 1]) < 0.01


CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.3),
    "pyramid attention": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
}


def steps(call: Any, model: Any) -> list[torch.Tensor]:
    """Three denoising steps whose latents move a little, so that a cache has something to do."""
    given, seen = inputs(), []
    with torch.no_grad(), model.cache_context("cond"):
        for step in range(3):
            latents = given["hidden_states"] * (1 + 0.02 * step)
            seen.append(call(**given | {"hidden_states": latents})[0])
    return seen


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("by_blocks", [True, False])
def test_caching_hooks_skip_the_same_work(name: str, by_blocks: bool) -> None:
    slow, uncached, model = tiny_flux(), tiny_flux(), tiny_flux()
    slow.enable_cache(CACHES[name]())
    model.enable_cache(CACHES[name]())
    expected = steps(slow, slow)
    if by_blocks:
        model.compile_repeated_blocks(backend="omniq", options=OPTIONS)
        fast = model
    else:
        fast = compiled(model)
    for actual, want in zip(steps(fast, model), expected, strict=True):
        assert 0 < error(actual, want) < 0.03
    assert not torch.equal(steps(uncached, uncached)[1], expected[1])  # the cache was used


def fuse(model: Any) -> Callable[[], Any]:
    model.fuse_qkv_projections()
    return model.unfuse_qkv_projections  # type: ignore[no-any-return]


def load_ip_adapter(model: Any) -> Callable[[], Any]:
    before, generator = model.attn_processors, torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 10

    image = {"proj.weight": draw(4 * 40, 32), "proj.bias": draw(4 * 40), "norm.weight": draw(40)}
    layers = {
        f"{block}.to_{of}_ip.{part}": draw(64, 40) if part == "weight" else draw(64)
        for block in range(2)
        for of in "kv"
        for part in ("weight", "bias")
    }
    state = {"image_proj": image | {"norm.bias": draw(40)}, "ip_adapter": layers}
    model._load_ip_adapter_weights([state])

    def unload() -> None:  # as FluxPipeline.unload_ip_adapter does
        model.encoder_hid_proj = None
        model.config.encoder_hid_dim_type = None
        model.set_attn_processor(before)

    return unload


@pytest.mark.parametrize(
    ("change", "words"),
    [(fuse, "unfuse_qkv_projections"), (load_ip_adapter, "unload_ip_adapter")],
)
def test_what_a_config_does_not_tell_is_not_saved(
    change: Callable[[Any], Callable[[], Any]], words: str, tmp_path: Path
) -> None:
    """diffusers leaves such tensors out when it loads, which omniq takes for a mistake."""
    model = tiny_flux()
    omniq.quantize_(model, {"method": "int8", "min_features": 16})
    expected = model(**inputs())[0]
    undo = change(model)
    with pytest.raises(omniq.CheckpointError, match=words):
        model.save_pretrained(tmp_path / "changed")
    assert not list(tmp_path.rglob("*.*"))
    undo()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(omniq.load_model(tmp_path / "saved")(**inputs())[0], expected)
