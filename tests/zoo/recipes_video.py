"""Other video models, and those of video with sound."""

from __future__ import annotations

from typing import Any

import torch

from zoo.recipe import BATCH, Draw, Recipe, grid

_HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}
_CHANNELS = {"in_channels": 6, "out_channels": 6}


def _video(draw: Draw, text: int = 40, frames: int = 3, scale: float = 1000) -> dict[str, Any]:
    return {
        "hidden_states": draw(BATCH, 6, frames, 8, 10),
        "encoder_hidden_states": draw(BATCH, 7, text),
        "timestep": draw.time(0.7 * scale),
    }


def _frames_first(draw: Draw, frames: int) -> dict[str, Any]:
    return _video(draw) | {"hidden_states": draw(BATCH, frames, 6, 8, 10)}


def _mask(draw: Draw) -> dict[str, Any]:
    return {"encoder_attention_mask": torch.ones(BATCH, 7)}


def _allegro_positions(draw: Draw) -> dict[str, Any]:
    """Tables of cosines and sines for an axis of time and two of space, and each patch's place."""
    angles = [torch.arange(size)[:, None] * draw.uniform(8) for size in (3, 4, 5)]
    return {
        "attention_mask": torch.ones(BATCH, 3, 8, 10),
        "image_rotary_emb": (
            tuple((angle.cos(), angle.sin()) for angle in angles),
            tuple(places[None] for places in grid(3, 4, 5).T),
        ),
    }


def _consisid(draw: Draw) -> dict[str, Any]:
    return _frames_first(draw, 1) | {
        "id_vit_hidden": [draw(BATCH, 3, 24)],
        "id_cond": draw(BATCH, 20),
    }


def _cosmos3(draw: Draw) -> dict[str, Any]:
    vision = torch.arange(4, 4 + 6)
    return {
        "input_ids": draw.integers(32, 4),
        "text_indexes": torch.arange(4),
        "position_ids": torch.arange(10).expand(3, 10),
        "und_len": 4,
        "sequence_length": 10,
        "vision_tokens": [draw(1, 6, 1, 2, 3)],
        "vision_token_shapes": [(1, 2, 3)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": torch.full((6,), 700.0),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def _ltx(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(BATCH, 2 * 4 * 5, 6),
        "encoder_hidden_states": draw(BATCH, 7, 40),
        "timestep": draw.time(700.0),
        "encoder_attention_mask": torch.ones(BATCH, 7, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 5,
    }


_LTX2 = {
    **_CHANNELS, **_HEADS, "cross_attention_dim": 64, "audio_in_channels": 8,
    "audio_out_channels": 8, "audio_num_attention_heads": 4, "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32, "num_layers": 2, "caption_channels": 40,
    "rope_double_precision": False,
}  # fmt: skip


def _ltx2(draw: Draw) -> dict[str, Any]:
    return _ltx(draw) | {
        "audio_hidden_states": draw(BATCH, 9, 8),
        "audio_encoder_hidden_states": draw(BATCH, 7, 40),
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def _refiner(draw: Draw) -> dict[str, Any]:
    tokens = 2 * 4 * 5
    return {
        "hidden_states": draw(BATCH, tokens, 6),
        "encoder_hidden_states": draw(BATCH, 7, 40),
        "timestep": draw.time(700.0, BATCH, tokens),
        "video_rotary_emb": draw.rotary(BATCH, tokens, 64),
        "encoder_attention_mask": torch.ones(BATCH, 7),
    }


def _camera(frames: int) -> torch.Tensor:
    """A camera that moves straight ahead: a flat 4 x 4 pose, then fx, fy, cx and cy."""
    pose = torch.eye(4).repeat(BATCH, frames, 1, 1)
    pose[..., 2, 3] = torch.arange(frames) * 0.1
    lens = torch.tensor([8.0, 8.0, 4.0, 4.0]).expand(BATCH, frames, 4)
    return torch.cat([pose.flatten(-2), lens], dim=-1)


def _sana_wm(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(BATCH, 6, 4, 8, 8),
        "timestep": draw.time(700.0, BATCH, 1, 4),
        "encoder_hidden_states": draw(BATCH, 1, 7, 40),
        "encoder_attention_mask": torch.ones(BATCH, 7, dtype=torch.long),
        "camera_conditions": _camera(4),
        "chunk_plucker": draw(BATCH, 12, 4, 8, 8),
    }


def _framepack(draw: Draw) -> dict[str, Any]:
    return _video(draw) | _mask(draw) | {
        "pooled_projections": draw(BATCH, 36),
        "image_embeds": draw(BATCH, 5, 32),
        "indices_latents": torch.arange(3),
        "guidance": draw.time(4000.0),
        "latents_clean": draw(BATCH, 6, 2, 8, 10),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": draw(BATCH, 6, 2, 8, 10),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": draw(BATCH, 6, 8, 8, 10),
        "indices_latents_history_4x": torch.arange(8),
    }  # fmt: skip


def _kandinsky(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(BATCH, 2, 4, 6, 6),
        "encoder_hidden_states": draw(BATCH, 7, 40),
        "timestep": draw.time(700.0),
        "pooled_projections": draw(BATCH, 36),
        "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(3)],
        "text_rope_pos": torch.arange(7),
    }


def _minimax(draw: Draw) -> dict[str, Any]:
    text, audio, video = torch.arange(4), torch.arange(4, 10), torch.arange(10, 22)
    return {
        "hidden_states": draw(BATCH, 12, 24),
        "audio_hidden_states": draw(BATCH, 6, 12),
        "encoder_hidden_states": draw(BATCH, 4, 40),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": torch.tensor([0] * 4 + [1] * 6 + [0] * 12),
        # 0 is video, 1 text, 2 sound.
        "token_tags": torch.tensor([1] * 4 + [2] * 6 + [0] * 12),
        "position_ids": torch.cat([torch.zeros(10, 3), grid(1, 3, 4).float()]),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


_HUNYUAN = {
    **_CHANNELS, **_HEADS, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
    "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 40, "pooled_projection_dim": 36,
    "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
_COG = {
    **_HEADS, **_CHANNELS, "time_embed_dim": 48, "text_embed_dim": 40, "num_layers": 2,
    "sample_width": 10, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 7,
}  # fmt: skip

RECIPES = {
    "CogVideoXTransformer3DModel": Recipe(_COG, lambda draw: _frames_first(draw, 3)),
    "ConsisIDTransformer3DModel": Recipe(
        {
            **_COG, "sample_frames": 1, "is_train_face": True, "cross_attn_interval": 1,
            "cross_attn_dim_head": 16, "cross_attn_num_heads": 2, "LFE_id_dim": 20,
            "LFE_vit_dim": 24, "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2,
            "LFE_num_id_token": 2, "LFE_num_querie": 3, "LFE_output_dim": 42,
            "LFE_ff_mult": 2, "LFE_num_scale": 1,
        },
        _consisid,
    ),
    "MochiTransformer3DModel": Recipe(
        {
            **_HEADS, "in_channels": 6, "num_layers": 2, "pooled_projection_dim": 36,
            "text_embed_dim": 40, "time_embed_dim": 32, "max_sequence_length": 7,
        },
        lambda draw: _video(draw)
        | {"encoder_attention_mask": torch.ones(BATCH, 7, dtype=torch.bool)},
        not_traced=("proj_out", "re:transformer_blocks.*attn1.*"),
    ),
    "AllegroTransformer3DModel": Recipe(
        {
            **_CHANNELS, "num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 2,
            "cross_attention_dim": 96, "sample_height": 8, "sample_width": 10,
            "sample_frames": 3, "caption_channels": 40,
        },
        lambda draw: _video(draw) | _mask(draw) | _allegro_positions(draw),
    ),
    "LatteTransformer3DModel": Recipe(
        {
            **_HEADS, **_CHANNELS, "num_layers": 2, "sample_size": 8, "patch_size": 2,
            "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "activation_fn": "gelu-approximate",
            "attention_bias": True, "caption_channels": 40, "cross_attention_dim": 64,
            "video_length": 3,
        },
        lambda draw: _video(draw) | {"hidden_states": draw(BATCH, 6, 3, 8, 8)},
    ),
    "EasyAnimateTransformer3DModel": Recipe(
        {
            **_HEADS, **_CHANNELS, "num_layers": 2, "mmdit_layers": 2, "time_embed_dim": 32,
            "text_embed_dim": 40, "patch_size": 2, "sample_width": 10, "sample_height": 8,
        },
        lambda draw: _video(draw),
    ),
    "HunyuanVideoTransformer3DModel": Recipe(
        _HUNYUAN,
        lambda draw: _video(draw)
        | _mask(draw)
        | {"pooled_projections": draw(BATCH, 36), "guidance": draw.time(4000.0)},
    ),
    "HunyuanVideoFramepackTransformer3DModel": Recipe(
        {**_HUNYUAN, "has_image_proj": True, "image_proj_dim": 32, "has_clean_x_embedder": True},
        _framepack,
        not_traced=("proj_out",),
    ),
    "HunyuanVideo15Transformer3DModel": Recipe(
        {
            **_CHANNELS, **_HEADS, "num_layers": 2, "num_refiner_layers": 1,
            "text_embed_dim": 40, "text_embed_2_dim": 36, "image_embed_dim": 32,
            "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "i2v",
        },
        lambda draw: _video(draw, frames=1)
        | _mask(draw)
        | {
            "encoder_hidden_states_2": draw(BATCH, 5, 36),
            "encoder_attention_mask_2": torch.ones(BATCH, 5),
            "image_embeds": draw(BATCH, 3, 32),
        },
        not_traced=("proj_out",),
    ),
    "LTXVideoTransformer3DModel": Recipe(
        {**_CHANNELS, **_HEADS, "cross_attention_dim": 64, "num_layers": 2,
         "caption_channels": 40},
        _ltx,
    ),
    "LTX2VideoTransformer3DModel": Recipe(_LTX2, _ltx2),
    "SanaWMLTX2RefinerTransformer3DModel": Recipe(_LTX2, _refiner),
    "SanaVideoTransformer3DModel": Recipe(
        {
            **_CHANNELS, **_HEADS, "num_layers": 2, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": 40,
            "sample_size": 8, "rope_max_seq_len": 32,
        },
        _video,
    ),
    "SanaWMTransformer3DModel": Recipe(
        {
            "in_channels": 6, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
            "softmax_every_n": 2, "linear_head_dim": 16, "caption_channels": 40,
            "mlp_ratio": 2.0, "chunk_plucker_channels": 12,
            "chunk_plucker_post_attn_blocks": 2,
        },
        _sana_wm,
        dtype=torch.float32,
        why_dtype="its camera geometry has no BF16 on CPU, and the model wants one dtype",
    ),
    "CosmosTransformer3DModel": Recipe(
        {
            **_CHANNELS, **_HEADS, "num_layers": 2, "text_embed_dim": 40, "adaln_lora_dim": 12,
            "max_size": (8, 32, 32), "patch_size": (1, 2, 2),
            # Without it torchvision would have to be installed, to resize a mask.
            "concat_padding_mask": False,
        },
        lambda draw: _video(draw) | {"fps": 24},
    ),
    "Cosmos3OmniTransformer": Recipe(
        {
            "head_dim": 16, "hidden_size": 64, "intermediate_size": 96, "latent_channel": 6,
            "latent_patch_size": 1, "num_attention_heads": 4, "num_hidden_layers": 2,
            "num_key_value_heads": 2, "patch_latent_dim": 6, "rope_axes_dim": [2, 3, 3],
            "vocab_size": 32,
        },
        _cosmos3,
    ),
    "MotifVideoTransformer3DModel": Recipe(
        {
            **_CHANNELS, **_HEADS, "num_layers": 1, "num_single_layers": 2,
            "num_decoder_layers": 1, "patch_size": 1, "text_embed_dim": 40,
            "rope_axes_dim": (4, 6, 6),
        },
        _video,
    ),
    "Kandinsky5Transformer3DModel": Recipe(
        {
            "in_visual_dim": 6, "out_visual_dim": 6, "in_text_dim": 40, "in_text_dim2": 36,
            "time_dim": 48, "model_dim": 64, "ff_dim": 96, "num_text_blocks": 1,
            "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
        },
        _kandinsky,
    ),
    "Kandinsky6Transformer3DModel": Recipe(
        {
            "in_visual_dim": 6, "out_visual_dim": 6, "in_text_dim": 40, "in_text_dim2": 36,
            "time_dim": 48, "model_dim": 64, "ff_dim": 96, "num_text_blocks": 1,
            "num_visual_blocks": 2, "axes_dims": (4, 6, 6), "visual_cond": True,
            "in_audio_dim": 12, "out_audio_dim": 12,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 2, 4, 6, 13),
            "encoder_hidden_states": draw(BATCH, 7, 40),
            "pooled_projections": draw(BATCH, 36),
            "timestep": draw.time(700.0),
            "audio_hidden_states": draw(BATCH, 5, 12),
        },
    ),
    "Kandinsky6SRTransformer3DModel": Recipe(
        {
            "in_visual_dim": 6, "out_visual_dim": 12, "time_dim": 48, "patch_size": (1, 2, 2),
            "model_dim": 64, "ff_dim": 96, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
        },
        lambda draw: {"hidden_states": draw(1, 2, 16, 16, 13), "timestep": draw.time(700.0, 1)},
    ),
    "MiniMaxH3Transformer3DModel": Recipe(
        {
            **_HEADS, "hidden_size": 72, "num_layers": 2, "num_refiner_layers": 1,
            "ffn_dim": 96, "in_channels": 6, "audio_in_channels": 12, "text_dim": 40,
            "freq_dim": 32, "time_embed_hidden_dim": 72, "time_embed_dim": 48,
            "rope_freq_dim": 2,
        },
        _minimax,
    ),
}  # fmt: skip
