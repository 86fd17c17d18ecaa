"""Several ControlNets in one component, each of which has a folder of its own."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel

import omniq_compile as omniq
from omniq_compile.pipelines.components import build_quant_config
from omniq_compile.pipelines.from_pretrained import check_components

INT8 = {"method": "int8", "min_features": 16}


def controlnet(seed: int) -> ControlNetModel:
    torch.manual_seed(seed)
    return ControlNetModel(
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32,
        attention_head_dim=4, conditioning_embedding_out_channels=(16, 32),
    ).eval().requires_grad_(False)  # fmt: skip


def test_each_is_saved_quantized(tmp_path: Path) -> None:
    several = MultiControlNetModel([controlnet(0), controlnet(1)])
    rows = omniq.quantize_(several, INT8)
    assert sum(row.method is not None for row in rows) > 10
    several.save_pretrained(str(tmp_path / "controlnet"))
    for model, folder in zip(several.nets, ("controlnet", "controlnet_1"), strict=True):
        loaded = omniq.load_model(tmp_path / folder, dtype=torch.float32)
        assert loaded.config["_class_name"] == "ControlNetModel"
        stored = dict(loaded.named_parameters())
        for name, parameter in model.named_parameters():
            assert type(parameter) is type(stored[name])
            if isinstance(parameter, omniq.QuantizedTensor):
                assert torch.equal(parameter.dequantize(), stored[name].dequantize())


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    MultiControlNetModel([controlnet(0), controlnet(1)]).save_pretrained(
        str(tmp_path / "controlnet")
    )
    controlnet(2).save_pretrained(tmp_path / "unet")
    index = {
        "_class_name": "StableDiffusionControlNetPipeline",
        "controlnet": ["diffusers", "MultiControlNetModel"],
        "unet": ["diffusers", "ControlNetModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_they_are_left_to_diffusers(pipeline: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The folder of their name holds the first alone."""
    with caplog.at_level(logging.WARNING, "omniq"):
        assert list(check_components(pipeline, build_quant_config({"unet": INT8}))) == ["unet"]
        assert caplog.messages == []
        assert list(check_components(pipeline, build_quant_config({"default": INT8}))) == ["unet"]
    assert "'controlnet' is a MultiControlNetModel, of several models" in caplog.text


def test_none_leaves_them_to_diffusers_too(
    pipeline: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = build_quant_config({"default": INT8, "controlnet": None})
    with caplog.at_level(logging.WARNING, "omniq"):
        assert list(check_components(pipeline, config)) == ["unet"]
    assert caplog.messages == []


def test_what_to_do_instead_is_said(pipeline: Path) -> None:
    with pytest.raises(omniq.OptionError, match=r"omniq_compile\.quantize_\(pipe\.controlnet, "):
        check_components(pipeline, build_quant_config({"controlnet": INT8}))
