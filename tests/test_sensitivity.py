"""A layer's error as `omniq tune` takes it, and the sets of kept layers that follow from errors."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import dequantized
from torch import nn

import omniq_compile as omniq
from omniq_compile import QuantConfig
from omniq_compile.memory import state_bytes
from omniq_compile.models.random_models import make_inputs, random_model
from omniq_compile.passes.patterns import first_match
from omniq_compile.quality.layer_units import (
    Layer,
    as_patterns,
    count_policies,
    path_of_keeping,
    quantized_layers,
)
from omniq_compile.quality.recorded_calls import flat_output, recording
from omniq_compile.quality.sensitivity import layer_errors
from omniq_compile.quality.switches import Switches


def test_recorded_calls_give_the_error_of_one_layer() -> None:
    model = random_model("QwenImageTransformer2DModel", "tiny", dtype=torch.float32)
    inputs = make_inputs(model, image_tokens=16, text_tokens=6, dtype=torch.float32)
    with torch.no_grad(), recording([model], most=3) as calls:
        for scale in range(1, 12):
            model(**{**inputs, "hidden_states": inputs["hidden_states"] * scale})
    # Of eleven, every fourth.
    ratios = [float(c.kwargs["hidden_states"].abs().max()) for c in calls]
    assert ratios == pytest.approx([ratios[0] * n for n in (1, 5, 9)])
    assert all(call.error() == 0 for call in calls)
    switches = Switches(model, QuantConfig.from_options({"method": "int8", "min_features": 32}))
    name = "transformer_blocks.1.attn.to_v"
    with switches.on([name]):
        found = calls[1].error()

    layer: Any = model.get_submodule(name)
    with torch.no_grad():
        expected = flat_output(model(**calls[1].kwargs)).double()
        weight = dequantized(layer.weight).float()
        # The published formula, for the weight and for each token.
        layer.forward = lambda x: F.linear(dequantized(x).float(), weight, layer.bias)
        out = flat_output(model(**calls[1].kwargs)).double()
    by_hand = float((out - expected).square().sum() / expected.square().sum())
    assert found == pytest.approx(by_hand, rel=0.01)


def test_a_weight_that_layers_share_is_saved_once() -> None:
    config = QuantConfig.from_options({"method": "int8", "min_features": 16})
    tied = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    tied[1].weight = tied[0].weight
    saved = state_bytes(tied)
    found = quantized_layers("transformer", tied, config)
    omniq.quantize_(tied, config)
    saved -= state_bytes(tied)
    assert [layer.extra_bytes for layer in found] == [saved, 0]


def layers(blocks: int, kinds: str = "abc", size: int = 10) -> list[Layer]:
    return [
        Layer("transformer", f"blocks.{b}.{kind}", f"blocks.{b}", "Block", size)
        for b in range(blocks)
        for kind in kinds
    ] + [Layer("transformer", "out", "", "", size)]


def test_layers_come_from_repeated_classes() -> None:
    model = random_model("QwenImageTransformer2DModel", "tiny")
    config = QuantConfig.from_options({"method": "int8", "min_features": 32})
    found = quantized_layers("transformer", model, config)
    assert {x.block for x in found} == {"", "transformer_blocks.0", "transformer_blocks.1"}
    kinds = {x.kind for x in found if x.block}
    assert len(kinds) * 2 == len([x for x in found if x.block]) == 28
    assert "transformer_blocks.*.attn.to_out.0" in kinds
    rows = {r.layer: r for r in omniq.quantize_(random_model(
        "QwenImageTransformer2DModel", "tiny"), config)}  # fmt: skip
    for layer in found:
        N, K = rows[layer.name].shape
        assert layer.extra_bytes == 2 * N * K - (N * K + 4 * N)


def test_a_single_bad_layer_of_a_large_model_is_found() -> None:
    """Kinds and blocks are measured, and then the few layers where both stand out."""
    many = layers(30, "abcdefgh")
    true = {layer.key: 1.0 for layer in many}
    true["transformer.blocks.17.e"] = 500.0
    asked: list[str] = []

    def measure(name: str, group: Any) -> float:
        asked.append(name)
        return sum(true[layer.key] for layer in group)

    errors = layer_errors(many, measure, most=45)
    assert len(asked) == 45
    assert max(errors, key=lambda k: errors[k]) == "transformer.blocks.17.e"
    assert errors["transformer.blocks.17.e"] == 500
    asked.clear()
    assert layer_errors(many, measure, most=1000) == true
    assert len(asked) == len(many)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("most", [45, 1000])
def test_a_layer_that_breaks_the_output_is_kept_first(value: float, most: int) -> None:
    """Of a model measured layer by layer, and by kinds and blocks."""
    many, bad = layers(30, "abcdefgh"), "transformer.blocks.17.e"
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad(), recording([model], most=1) as calls:
        model(torch.randn(3, 4))

    def measure(name: str, group: Any) -> float:
        change = value if bad in {layer.key for layer in group} else 0.01 * len(group)
        with torch.no_grad():
            model.weight[0, 0] += change
            error = calls[0].error()
            model.weight[0, 0] = 1
        return error

    with torch.no_grad():
        model.weight[0, 0] = 1
        calls[0].expected.copy_(model(*calls[0].args).flatten())
    errors = layer_errors(many, measure, most)
    assert all(math.isfinite(error) for error in errors.values())
    (first,) = path_of_keeping(many, errors, most_policies=100)[1]
    assert first == bad


def test_the_path_keeps_the_best_first_within_the_policies_that_pytorch_compiles() -> None:
    many = layers(12)
    numbers = torch.randperm(len(many)).tolist()
    errors = {layer.key: 1.0 + n for layer, n in zip(many, numbers, strict=True)}
    free = path_of_keeping(many, errors, most_policies=100)
    assert [len(kept) for kept in free] == list(range(len(many) + 1))
    order = [next(iter(b - a)) for a, b in pairwise(free)]
    assert order == sorted(errors, key=lambda k: -errors[k])
    tight = path_of_keeping(many, errors, most_policies=3)
    assert tight[-1] == free[-1]
    assert all(a < b for a, b in pairwise(tight))
    assert max(count_policies(many, kept) for kept in tight) == 3
    assert max(count_policies(many, kept) for kept in free) > 3


@pytest.mark.parametrize(
    ("kept", "patterns"),
    [
        ([], []),
        (["blocks.1.a"], ["blocks.1.a"]),
        (["blocks.0.b", "blocks.1.b", "blocks.2.b"], ["blocks.*.b"]),
        (["blocks.2.a", "blocks.2.b", "blocks.2.c", "out"], ["blocks.2", "out"]),
    ],
)
def test_patterns_name_what_is_kept_and_nothing_else(kept: list[str], patterns: list[str]) -> None:
    many = layers(3)
    found = as_patterns(many, {f"transformer.{name}" for name in kept})
    assert found == patterns
    assert {x.name for x in many if first_match(found, x.name)} == set(kept)


def test_a_name_inside_another_one_is_escaped() -> None:
    many = [Layer("t", name, "", "", 1) for name in ("proj", "head.proj", "proj.0")]
    found = as_patterns(many, {"t.proj"})
    assert [x.name for x in many if first_match(found, x.name)] == ["proj"]
