"""Whole diffusers pipelines, tiny and with random weights, that begin with text or a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from omniq_compile.models.random_models import random_model

WORDS = ["a", "red", "fox", "in", "the", "snow"]


def tiny_tokenizer(chat_template: str | None = None) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: n for n, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=16,
        chat_template=chat_template,
    )  # fmt: skip


def tiny_text(width: int) -> tuple[Any, Any]:
    import transformers

    tokenizer = tiny_tokenizer()
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=32, d_ff=128, num_layers=1, num_heads=2
    )
    return tokenizer, transformers.UMT5EncoderModel(config).to(torch.bfloat16)


def save_text_to_image(folder: Path) -> Path:
    """Save an AuraFlow pipeline that draws 32 x 32 pictures."""
    torch.manual_seed(0)
    tokenizer, encoder = tiny_text(64)
    AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKL(
            latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, sample_size=32,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        ).to(torch.bfloat16),
        transformer=AuraFlowTransformer2DModel(
            sample_size=16, in_channels=4, out_channels=4, num_mmdit_layers=1,
            num_single_dit_layers=2, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=64, caption_projection_dim=64, pos_embed_max_size=64,
        ).to(torch.bfloat16),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_text_to_video(folder: Path) -> Path:
    """Save a Wan pipeline with one expert, whose videos have a frame more than four times one."""
    torch.manual_seed(0)
    tokenizer, encoder = tiny_text(256)
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(),
        transformer=random_model("WanTransformer3DModel", "tiny", width=128),
    ).save_pretrained(folder)
    return folder


def save_image_to_video(folder: Path) -> Path:
    """Save a Wan pipeline like the one above, whose videos begin with a picture."""
    torch.manual_seed(0)
    tokenizer, encoder = tiny_text(256)
    WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(),
        # The picture's latents and their mask come beside the noise.
        transformer=WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=32, in_channels=36, out_channels=16,
            text_dim=256, ffn_dim=256, num_layers=2,
        ).to(torch.bfloat16),
        image_encoder=None,
        image_processor=None,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_index(folder: Path, class_name: str) -> None:
    """Name a pipeline's class in its folder, which is all that commands read before they load."""
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}))


def required_arguments(command: str, folder: Path, picture: str = "x.png") -> list[str]:
    """Return what ``generate``, ``compare`` or ``tune`` needs beside a pipeline and its call.

    They would write into ``folder``: a picture or video of this name, or a folder ``out``.
    """
    out = str(folder / (picture if command == "generate" else "out"))
    if command == "tune":
        return ["--method", "int8", "--target-psnr", "30", "--out", out]
    return ["--quantization", "int8", "--out", out]
