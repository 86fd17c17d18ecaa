"""Every transformer of diffusers, tiny, in every 8-bit method, beside BF16."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

import omniq_compile as omniq
from omniq_compile.lowering.errors import GradientError
from omniq_compile.passes.patterns import first_match
from zoo.walk import (
    METHODS,
    RECIPES,
    Backend,
    build_recipe,
    exported_transformers,
    linears_that_run,
    relative_error,
    tensors,
)

LIMITS = {"int8": 0.05, "fp8": 0.12, "mxfp8": 0.12}

# Classes that plain torch.compile cannot run on CPU, with what its error says: none of those that
# diffusers 0.42 exports.
CANNOT_COMPILE: dict[str, str] = {}

# A dozen that `make test` runs; `make zoo` runs all. One of each kind: joint and single blocks,
# cross-attention, lists as inputs, video, two streams, sound, experts, U-Net parts.
DOZEN = (
    "AceStepTransformer1DModel", "CogVideoXTransformer3DModel", "CogView4Transformer2DModel",
    "DiTTransformer2DModel", "HunyuanVideoTransformer3DModel", "LTXVideoTransformer3DModel",
    "NucleusMoEImageTransformer2DModel", "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel", "SanaTransformer2DModel", "Transformer2DModel",
    "WanTransformer3DModel",
)  # fmt: skip


def parameters() -> list[object]:
    return [
        pytest.param(name, marks=() if name in DOZEN else pytest.mark.zoo)
        for name in exported_transformers()
    ]


def test_every_recipe_is_for_a_class_that_exists() -> None:
    assert sorted(RECIPES.keys() - exported_transformers()) == []
    assert set(DOZEN) <= RECIPES.keys()


@pytest.mark.parametrize("name", parameters())
@torch.no_grad()
def test_a_class_stays_near_bf16(name: str) -> None:
    assert name in RECIPES, (
        f"diffusers {diffusers.__version__} exports {name}, and the zoo has no recipe for it. Add "
        "one to a tests/zoo/recipes_*.py: a tiny config, and the inputs of one forward."
    )
    recipe = RECIPES[name]
    model, inputs = build_recipe(name)
    called, output = linears_that_run(model, inputs())
    expected = tensors(output)
    for tensor in expected:
        assert torch.isfinite(tensor).all()
        assert 0.1 < tensor.float().std() < 10, "the weights are not healthy"
    backend = Backend()
    compiled = torch.compile(model, backend=backend)
    if name in CANNOT_COMPILE:
        with pytest.raises(Exception, match=CANNOT_COMPILE[name]):
            compiled(**inputs())
        return
    assert relative_error(tensors(compiled(**inputs())), expected) < 0.02  # plain torch.compile
    for method in METHODS:
        backend.method = method
        actual = tensors(compiled(**inputs()))
        assert [t.shape for t in actual] == [t.shape for t in expected]
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        assert all(torch.isfinite(t).all() for t in actual)
        assert 1e-4 < relative_error(actual, expected) < LIMITS[method], method
        rewritten, in_float32 = fates(model, called, backend, method)
        left = called - rewritten - in_float32
        left = {layer for layer in left if not first_match(recipe.not_traced, layer)}
        assert left == set(), f"{method}: in BF16 in {backend.graphs} graphs"
        assert len(rewritten) > len(called) // 2


def stored_parameters() -> list[object]:
    """Two whose graphs break, so that some of their layers run as Python, and of zoo the rest."""
    always = ("MochiTransformer3DModel", "NucleusMoEImageTransformer2DModel")
    return [
        pytest.param(name, marks=() if name in always else pytest.mark.zoo)
        for name in exported_transformers()
    ]


@pytest.mark.parametrize("name", stored_parameters())
@torch.no_grad()
def test_a_class_that_is_stored_quantized_stays_near_bf16(name: str) -> None:
    model, inputs = build_recipe(name)
    expected = tensors(model(**inputs()))
    options = {"method": "int8", "min_features": 1, "compiler": "eager"}
    plan = omniq.quantize_(model.requires_grad_(False), options)
    assert any(layer.method == "int8" for layer in plan)
    assert 1e-4 < relative_error(tensors(model(**inputs())), expected) < LIMITS["int8"]
    compiled = torch.compile(model, backend="omniq", options=options)
    assert 1e-4 < relative_error(tensors(compiled(**inputs())), expected) < LIMITS["int8"]


def fates(
    model: nn.Module, called: set[str], backend: Backend, method: str
) -> tuple[set[str], set[str]]:
    """Return which linear layers that ran were rewritten, and which the model holds in float32."""
    weights = {layer: model.get_submodule(layer).weight for layer in called}
    rewritten = {layer for layer, w in weights.items() if id(w) in backend.weights[method]}
    low = any(w.dtype is torch.bfloat16 for w in weights.values())
    return rewritten, {layer for layer, w in weights.items() if low and w.dtype is torch.float32}


@pytest.mark.parametrize("name", ["MochiTransformer3DModel", "NucleusMoEImageTransformer2DModel"])
@pytest.mark.zoo
@torch.no_grad()
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
def test_sizes_that_depend_on_data_are_traced_where_dynamo_may(name: str) -> None:
    """With these settings Dynamo breaks neither graph, and M is a number that only a run tells."""
    model, inputs = build_recipe(name)
    called, output = linears_that_run(model, inputs())
    backend = Backend()
    compiled = torch.compile(model, backend=backend)
    for method in METHODS:
        backend.method = method
        assert relative_error(tensors(compiled(**inputs())), tensors(output)) < LIMITS[method]
        rewritten, in_float32 = fates(model, called, backend, method)
        assert called - rewritten - in_float32 == set()


@pytest.mark.zoo
def test_gradients_are_refused_with_what_to_do() -> None:
    model, inputs = build_recipe("DiTTransformer2DModel")
    model.requires_grad_(True)
    options = {"method": "int8", "min_features": 1, "compiler": "eager"}
    with pytest.raises(Exception, match="requires_grad_") as caught:
        torch.compile(model, backend="omniq", options=options)(**inputs())
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), GradientError)
