"""Models that are built from a configuration alone, without values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from omniq_compile.models.argument import find_model
from omniq_compile.models.families import FAMILIES, preset_config
from omniq_compile.models.random_models import random_model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_without_weights_is_the_model_with_them(name: str) -> None:
    real, shapes = random_model(name, "tiny"), find_model(f"{name}:tiny").model
    assert {n: (p.shape, p.dtype) for n, p in shapes.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.named_parameters()
    }
    assert not any(p.requires_grad for p in shapes.parameters())
    assert not shapes.training


def test_no_memory_is_taken_for_a_model_of_full_width() -> None:
    config = preset_config("QwenImageTransformer2DModel", "block")
    assert config["num_attention_heads"] * config["attention_head_dim"] == 3072
    parameters = list(find_model("QwenImageTransformer2DModel:block").model.parameters())
    assert sum(p.numel() for p in parameters) > 300e6
    assert all(isinstance(p.data, torch._subclasses.FakeTensor) for p in parameters)


@pytest.mark.parametrize("name", ["Qwen-Image", "Z-Image-Turbo"])
def test_released_configurations_are_read_as_diffusers_reads_them(name: str) -> None:
    """Qwen-Image's holds a setting that its class does not take."""
    folder = Path(__file__).parent / "configs" / name
    model = find_model(str(folder)).model
    with torch.device("meta"):
        cls = type(model)
        expected = cls.from_config(cls.load_config(folder / "transformer"))
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in expected.named_parameters()
    }


def test_how_weights_are_stored_is_no_setting(tmp_path: Path) -> None:
    sizes = preset_config("FluxTransformer2DModel", "tiny")
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel", "quantization_config": {}} | sizes)
    )
    assert "quantization_config" not in find_model(str(file)).model.config
