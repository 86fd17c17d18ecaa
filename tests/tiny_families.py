"""Whole pipelines of the four families, tiny and with random weights, with their text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    QwenImagePipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    ZImagePipeline,
)
from tiny_pipelines import tiny_text, tiny_tokenizer

from omniq_compile.models.random_models import random_model

WIDTH = 256


def _picture_autoencoder(channels: int) -> Any:
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        sample_size=64,
        shift_factor=0.1,
        scaling_factor=0.4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ).to(torch.bfloat16)


def save_qwen_image(folder: Path) -> Path:
    """Save a pipeline whose text encoder is a tiny Qwen2.5-VL."""
    torch.manual_seed(0)
    transformer = random_model("QwenImageTransformer2DModel", "tiny", width=WIDTH)
    text = dict(
        vocab_size=64,
        hidden_size=transformer.config.joint_attention_dim,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    )
    vision = dict(
        depth=1,
        hidden_size=32,
        num_heads=2,
        intermediate_size=64,
        out_hidden_size=transformer.config.joint_attention_dim,
    )
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    QwenImagePipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=encoder.to(torch.bfloat16),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1
        ).to(torch.bfloat16),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return folder


def save_z_image(folder: Path) -> Path:
    """Save a pipeline whose text encoder is a tiny Qwen3."""
    torch.manual_seed(0)
    transformer = random_model("ZImageTransformer2DModel", "tiny", width=WIDTH)
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=transformer.config.cap_feat_dim,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    ZImagePipeline(
        tokenizer=tiny_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"),
        text_encoder=transformers.Qwen3Model(config).to(torch.bfloat16),
        vae=_picture_autoencoder(transformer.config.in_channels),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ).save_pretrained(folder)
    return folder


def save_flux(folder: Path) -> Path:
    """Save a pipeline whose text encoders are a tiny CLIP and a tiny T5."""
    torch.manual_seed(0)
    transformer = random_model("FluxTransformer2DModel", "tiny", width=WIDTH)
    clip = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=transformer.config.pooled_projection_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=32,
        eos_token_id=0,
    )
    t5 = transformers.T5Config(
        vocab_size=64,
        d_model=transformer.config.joint_attention_dim,
        d_kv=32,
        d_ff=128,
        num_layers=1,
        num_heads=2,
    )
    FluxPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=transformers.CLIPTextModel(clip).to(torch.bfloat16),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_2=transformers.T5EncoderModel(t5).to(torch.bfloat16),
        vae=_picture_autoencoder(transformer.config.in_channels // 4),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ).save_pretrained(folder)
    return folder


def save_wan(folder: Path) -> Path:
    """Save a pipeline of two experts, as Wan2.2's 14B models have."""
    torch.manual_seed(0)
    experts = [
        random_model("WanTransformer3DModel", "tiny", width=WIDTH, seed=seed) for seed in (0, 1)
    ]
    tokenizer, encoder = tiny_text(experts[0].config.text_dim)
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(),
        transformer=experts[0],
        transformer_2=experts[1],
        boundary_ratio=0.875,
    ).save_pretrained(folder)
    return folder
