"""diffusers' modular pipelines: components quantized while they load, compiled and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import error
from tiny_flux import OPTIONS, inputs, tiny_flux

import omniq_compile as omniq
from omniq_compile import QuantizedTensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flux pipeline that begins with an encoded prompt."""
    place = tmp_path_factory.mktemp("modular") / "flux"
    vae = diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, shift_factor=0.0,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).to(torch.bfloat16)  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    transformer = tiny_flux(num_layers=0, num_single_layers=2)
    diffusers.FluxPipeline(scheduler, vae, *[None] * 4, transformer).save_pretrained(place)
    return place


def loaded(folder: Path, **loading: Any) -> Any:
    blocks = diffusers.FluxAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline(str(folder))
    pipe.load_components(dtype=torch.bfloat16, **loading)
    return pipe


def picture(pipe: Any) -> torch.Tensor:
    encoded = inputs()
    images = pipe(
        prompt_embeds=encoded["encoder_hidden_states"],
        pooled_prompt_embeds=encoded["pooled_projections"],
        height=32, width=32, num_inference_steps=2, output="images", output_type="np",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return torch.as_tensor(images)


def test_a_component_is_quantized_while_it_loads_and_saved(folder: Path, tmp_path: Path) -> None:
    plain = picture(loaded(folder))
    config = omniq.DiffusersConfig("int8", min_features=OPTIONS["min_features"])
    pipe = loaded(folder, quantization_config={"transformer": config})
    assert any(isinstance(p, QuantizedTensor) for p in pipe.transformer.parameters())
    assert not any(isinstance(p, QuantizedTensor) for p in pipe.vae.parameters())
    dequantized = picture(pipe)
    assert 0 < error(dequantized, plain) < 0.03
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    assert torch.equal(picture(loaded(tmp_path)), dequantized)
    for load in (omniq.from_pretrained, omniq.load_model):
        with pytest.raises(omniq.CheckpointError, match=r"modular.*subfolder=.*load_comp"):
            load(tmp_path)
    omniq.load_model(tmp_path, subfolder="transformer")
    pipe.transformer.compile_repeated_blocks(backend="omniq", options=OPTIONS)
    assert 0 < error(picture(pipe), plain) < 0.03
