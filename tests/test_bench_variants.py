"""What `omniq bench` makes of a model for torchao: at its best, and at no other variant's cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config

from omniq_compile.benchmark import variants
from omniq_compile.benchmark.linears import linear_calls
from omniq_compile.benchmark.variants import (
    TORCHAO,
    TORCHAO_FP8,
    TORCHAO_INT8,
    TORCHAO_SETTINGS,
)
from omniq_compile.models.random_models import make_inputs, random_model

quantization = pytest.importorskip("torchao.quantization")


def settings() -> dict[str, Any]:
    return {**inductor_config.get_config_copy(), "float32": torch.get_float32_matmul_precision()}


def test_settings_are_those_that_torchao_sets_itself() -> None:
    before, precision = inductor_config.get_config_copy(), torch.get_float32_matmul_precision()
    with inductor_config.patch(before):
        quantization.utils.recommended_inductor_config_setter()
        after = inductor_config.get_config_copy()
    torch.set_float32_matmul_precision(precision)  # before 0.18 it sets that too
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed.items() <= TORCHAO_SETTINGS.items()
    assert TORCHAO_SETTINGS.items() <= after.items()


@pytest.mark.parametrize("variant", TORCHAO, ids=lambda v: v.name)
def test_settings_are_those_of_torchao_alone(variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Any] = []
    compiled: list[dict[str, Any]] = []
    quantize_ = quantization.quantize_

    def quantize(model: nn.Module, config: Any, **more: Any) -> None:
        configs.append(config)
        if "int8" in variant.name:  # its fp8 needs a GPU
            quantize_(model, config, **more)

    monkeypatch.setattr(quantization, "quantize_", quantize)
    monkeypatch.setattr(torch, "compile", lambda model, **more: compiled.append(more) or model)
    before = settings()
    model, x = nn.Sequential(nn.Linear(64, 64)).bfloat16(), torch.randn(4, 64).bfloat16()
    with torch.no_grad():
        variant.build(model, {"input": x})(x)
    assert settings() == before
    untuned = {"coordinate_descent_tuning": False} if "untuned" in variant.name else {}
    assert compiled == [{"options": TORCHAO_SETTINGS | untuned}]
    assert bool(untuned) == any("takes minutes" in note for note in variant.notes)
    assert [config.set_inductor_config for config in configs] == [False]
    assert any("recommends" in note for note in variant.notes)


@pytest.mark.parametrize("fewest", [1, 17])
def test_linears_of_few_rows_are_left_out_where_int8_does_not_take_them(
    fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "FEWEST_ROWS", {"cpu": fewest})
    model = random_model("QwenImageTransformer2DModel", width=64, num_blocks=1)
    inputs = make_inputs(model, image_tokens=20, text_tokens=18)
    with torch.no_grad():
        TORCHAO_INT8.build(model, inputs)
    left = {name for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and type(m.weight.data) is torch.Tensor}  # fmt: skip
    of_the_timestep = {
        "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
        "transformer_blocks.0.img_mod.1", "transformer_blocks.0.txt_mod.1", "norm_out.linear",
    }  # fmt: skip
    assert left == (of_the_timestep if fewest == 17 else set())


def test_linears_in_float32_are_left_out_where_fp8_takes_bf16_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []

    def quantize(model: nn.Module, config: Any, filter_fn: Any) -> None:
        taken.extend(name for name, m in model.named_modules() if filter_fn(m, name))

    monkeypatch.setattr(quantization, "quantize_", quantize)
    model = random_model("WanTransformer3DModel", width=64, num_blocks=1)
    TORCHAO_FP8.build(model, {})
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    real = {name for name, m in linears.items() if m.weight.dtype is torch.float32}
    assert real == {f"condition_embedder.time_embedder.linear_{n}" for n in (1, 2)}
    assert taken == [name for name in linears if name not in real]


def test_linear_calls_are_in_order_with_their_rows() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(first, second, first)
    calls = linear_calls(model, lambda: model(torch.ones(2, 3, 4)))
    assert calls == [(first, 6), (second, 6), (first, 6)]
    assert not first._forward_hooks
