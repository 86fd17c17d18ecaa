"""Video models in the manner of Wan: patches of latents, text by cross-attention."""

from __future__ import annotations

from typing import Any

import torch

from zoo.recipe import BATCH, Draw, Recipe

_WAN = {
    "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 6, "out_channels": 6,
    "text_dim": 40, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip


def _video(draw: Draw, frames: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": draw(BATCH, 6, frames, 8, 10),
        "timestep": draw.time(700.0),
        "encoder_hidden_states": draw(BATCH, 7, 40),
    }


def _far(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 6, 16, 16),
        "timestep": torch.full((1, 4), 500.0),
        "r_timestep": torch.full((1, 4), 250.0),
        "encoder_hidden_states": draw(1, 7, 40),
        "chunk_partition": [2, 2],
    }


def _helios(draw: Draw) -> dict[str, Any]:
    def places(count: int) -> torch.Tensor:
        return torch.arange(count).float().expand(BATCH, count)

    return _video(draw, 2) | {
        "indices_hidden_states": places(2),
        "indices_latents_history_short": places(1),
        "indices_latents_history_mid": places(1),
        "indices_latents_history_long": places(4),
        "latents_history_short": draw(BATCH, 6, 1, 8, 10),
        "latents_history_mid": draw(BATCH, 6, 1, 8, 10),
        "latents_history_long": draw(BATCH, 6, 4, 8, 10),
    }


def _animate(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 16, 21, 8, 8),
        "timestep": draw.time(700.0, 1),
        "encoder_hidden_states": draw(1, 7, 40),
        "encoder_hidden_states_image": draw(1, 5, 36),
        "pose_hidden_states": draw(1, 6, 20, 8, 8),
        # 77 frames of a face are 20 latent ones.
        "face_pixel_values": draw(1, 3, 77, 16, 16),
    }


def _animate_2(draw: Draw) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [draw(6, 2, 4, 4)],
        "timestep": draw.time(700.0, 1),
        "encoder_hidden_states": [draw(7, 40)],
        "condition_latents": [draw(8, 2, 4, 4)],
        "encoder_hidden_states_image": draw(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 8,
        "offset_grid_sizes": torch.tensor([[2, 2, 2]]),
    }


RECIPES = {
    "WanTransformer3DModel": Recipe(_WAN, _video),
    "ChronoEditTransformer3DModel": Recipe(_WAN, lambda draw: _video(draw, 2)),
    "SkyReelsV2Transformer3DModel": Recipe(
        {**_WAN, "inject_sample_info": True},
        lambda draw: _video(draw) | {"fps": torch.tensor([0, 1])},
    ),
    "WanVACETransformer3DModel": Recipe(
        {**_WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 8},
        lambda draw: _video(draw) | {"control_hidden_states": draw(BATCH, 8, 3, 8, 10)},
    ),
    "AnyFlowTransformer3DModel": Recipe(
        _WAN,
        lambda draw: _video(draw)
        | {
            "hidden_states": draw(BATCH, 3, 6, 8, 10),
            "timestep": draw.time(700.0, BATCH, 3),
            "r_timestep": draw.time(300.0, BATCH, 3),
        },
    ),
    "AnyFlowFARTransformer3DModel": Recipe(
        {**_WAN, "full_chunk_limit": 3, "compressed_patch_size": (1, 4, 4)}, _far
    ),
    "HeliosTransformer3DModel": Recipe(
        {k: v for k, v in _WAN.items() if k != "rope_max_seq_len"} | {"rope_dim": (4, 6, 6)},
        _helios,
    ),
    "WanAnimateTransformer3DModel": Recipe(
        {
            **_WAN, "in_channels": 16, "latent_channels": 6, "image_dim": 36,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16, "motion_style_dim": 16, "motion_dim": 8,
            "motion_encoder_dim": 32, "face_encoder_hidden_dim": 32,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
        },
        _animate,
    ),
    "WanAnimate2Transformer3DModel": Recipe(
        {
            "text_len": 16, "in_dim": 14, "dim": 64, "ffn_dim": 96, "freq_dim": 32,
            "text_dim": 40, "out_dim": 6, "num_heads": 4, "num_layers": 2,
        },
        _animate_2,
        not_traced=("text_embedding", "time_embedding", "time_projection"),
    ),
}  # fmt: skip
