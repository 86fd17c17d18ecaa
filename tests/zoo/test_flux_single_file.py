"""A FLUX file in its authors' names, which diffusers converts at the true width alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_text_encoders import same

import omniq_compile as omniq
from omniq_compile.layer_plan import count_quantized

pytestmark = pytest.mark.zoo

CONFIG = Path(__file__).parents[1] / "configs/FLUX.1-dev/transformer/config.json"

# Their names are those of black-forest-labs/flux, src/flux/modules/layers.py and model.py.
RENAMED = [
    (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight",
     r"single_blocks.\1.norm.query_norm.scale"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight",
     r"single_blocks.\1.norm.key_norm.scale"),
    (r"^transformer_blocks\.(\d+)\.", r"double_blocks.\1."),
    (r"norm1\.linear", "img_mod.lin"),
    (r"norm1_context\.linear", "txt_mod.lin"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
    (r"attn\.to_out\.0", "img_attn.proj"),
    (r"attn\.to_add_out", "txt_attn.proj"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.0"),
    (r"ff_context\.net\.2", "txt_mlp.2"),
    (r"ff\.net\.0\.proj", "img_mlp.0"),
    (r"ff\.net\.2", "img_mlp.2"),
]  # fmt: skip

# Tensors of theirs that are several of diffusers', one below the other.
JOINED = [
    (r"^(double_blocks\.\d+)\.attn\.", ("to_q", "to_k", "to_v"), r"\1.img_attn.qkv."),
    (
        r"^(double_blocks\.\d+)\.attn\.",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        r"\1.txt_attn.qkv.",
    ),
    (
        r"^single_transformer_blocks(\.\d+)\.",
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        r"single_blocks\1.linear1.",
    ),
]


def of_flux(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("norm_out.linear"):
            tensor = torch.cat(tensor.chunk(2)[::-1])  # scale and shift, the other way round
        for ours, theirs in RENAMED:
            name = re.sub(ours, theirs, name)
        found[name] = tensor
    for start, parts, joined in JOINED:
        first = re.compile(start + re.escape(parts[0]) + r"\.")
        for name in [name for name in found if first.match(name)]:
            rows = [found.pop(name.replace(parts[0], part)) for part in parts]
            found[first.sub(joined, name)] = torch.cat(rows)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, as diffusers saves it: one block of each kind."""
    config = json.loads(CONFIG.read_text()) | {"num_layers": 1, "num_single_layers": 1}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = diffusers.FluxTransformer2DModel.from_config(config)
    finally:
        torch.set_default_dtype(before)
    path = tmp_path_factory.mktemp("flux")
    model.save_pretrained(path)
    tensors = load_file(path / "diffusion_pytorch_model.safetensors")
    save_file(of_flux(tensors), path / "flux1-dev.safetensors")
    return path


@pytest.mark.parametrize("method", ["int8", "mxfp4"])
def test_it_is_what_load_model_makes_of_a_folder(method: str, folder: Path) -> None:
    expected = omniq.load_model(folder, options={"method": method})
    model = diffusers.FluxTransformer2DModel.from_single_file(
        str(folder / "flux1-dev.safetensors"),
        config=str(folder),
        dtype=torch.bfloat16,
        quantization_config=omniq.DiffusersConfig(method),
    )
    assert same(model, expected) == count_quantized(expected) == 28
