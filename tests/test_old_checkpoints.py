"""Checkpoints that older releases of diffusers wrote, with other names for what a model has."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL

import omniq_compile as omniq
from omniq_compile import DiffusersConfig, QuantizedTensor

OPTIONS = {"method": "int8", "min_features": 64}


@pytest.mark.parametrize("by_diffusers", [False, True])
def test_a_vae_of_an_old_checkpoint(by_diffusers: bool, tmp_path: Path) -> None:
    """Its attention was a class of its own, with other names, which diffusers translates."""
    vae = AutoencoderKL(block_out_channels=(64,), norm_num_groups=4).to(torch.bfloat16)
    vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in safetensors.torch.load_file(file).items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        tensors[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    if by_diffusers:
        loaded = AutoencoderKL.from_pretrained(
            tmp_path, torch_dtype=torch.bfloat16, quantization_config=DiffusersConfig(**OPTIONS)
        )
    else:
        loaded = omniq.load_model(tmp_path, options=OPTIONS)
    omniq.quantize_(vae, OPTIONS)
    assert isinstance(loaded.encoder.mid_block.attentions[0].to_q.weight, QuantizedTensor)
    actual, expected = (omniq.flatten_state(m.state_dict())[0] for m in (loaded, vae))
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
