"""Image models in the manner of FLUX: joint blocks, then single ones, with positions as inputs."""

from __future__ import annotations

from typing import Any

import torch

from zoo.recipe import BATCH, Draw, Recipe, grid, prefixed

_HEADS = {"attention_head_dim": 16, "num_attention_heads": 4}
_BLOCKS = {"num_layers": 2, "num_single_layers": 2, **_HEADS}
_ROPE = (4, 6, 6)


def _tokens(draw: Draw, channels: int, text: int, scale: float = 1.0) -> dict[str, Any]:
    return {
        "hidden_states": draw(BATCH, 20, channels),
        "encoder_hidden_states": draw(BATCH, 7, text),
        "timestep": draw.time(0.7 * scale),
        "img_ids": prefixed(grid(4, 5), 1).float(),
        "txt_ids": torch.zeros(7, 3),
    }


def _four_axes(draw: Draw, channels: int, text: int) -> dict[str, Any]:
    image = prefixed(grid(4, 5), 1)
    return _tokens(draw, channels, text) | {
        "img_ids": torch.cat([image, image.new_zeros(20, 1)], dim=1),
        "txt_ids": torch.cat([torch.zeros(7, 3), torch.arange(7)[:, None]], dim=1).long(),
    }


RECIPES = {
    "FluxTransformer2DModel": Recipe(
        {
            "in_channels": 24, **_BLOCKS, "joint_attention_dim": 40, "pooled_projection_dim": 36,
            "guidance_embeds": True, "axes_dims_rope": _ROPE,
        },
        lambda draw: _tokens(draw, 24, 40)
        | {"pooled_projections": draw(BATCH, 36), "guidance": draw.time(4.0)},
    ),
    "Flux2Transformer2DModel": Recipe(
        {
            "in_channels": 24, **_BLOCKS, "joint_attention_dim": 40,
            "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda draw: _four_axes(draw, 24, 40) | {"guidance": draw.time(4.0)},
    ),
    "Flux3Transformer2DModel": Recipe(
        {
            "in_channels": 24, "cond_in_channels": 28, **_BLOCKS, "joint_attention_dim": 40,
            "timestep_channels": 32, "axes_dims_rope": (4, 4, 4, 4), "flow_map": True,
        },
        lambda draw: _four_axes(draw, 24, 40)
        | {
            "image_cond_hidden_states": draw(BATCH, 6, 28),
            "image_cond_ids": torch.cat([grid(2, 3), torch.ones(6, 2).long()], dim=1),
            "target_timestep": draw.time(0.4),
        },
    ),
    "ChromaTransformer2DModel": Recipe(
        {
            "in_channels": 24, **_BLOCKS, "joint_attention_dim": 40, "axes_dims_rope": _ROPE,
            "approximator_num_channels": 8, "approximator_hidden_dim": 48,
            "approximator_layers": 2,
        },
        lambda draw: _tokens(draw, 24, 40),
    ),
    "BriaTransformer2DModel": Recipe(
        {"in_channels": 24, **_BLOCKS, "joint_attention_dim": 40, "axes_dims_rope": [4, 6, 6]},
        lambda draw: _tokens(draw, 24, 40, 1000),
    ),
    "BriaFiboTransformer2DModel": Recipe(
        {
            "in_channels": 24, **_BLOCKS, "joint_attention_dim": 64, "text_encoder_dim": 32,
            "axes_dims_rope": [4, 6, 6],
        },
        lambda draw: _tokens(draw, 24, 64, 1000)
        | {"text_encoder_layers": [draw(BATCH, 7, 32) for _ in range(4)]},
    ),
    "LongCatImageTransformer2DModel": Recipe(
        {
            "in_channels": 24, **_BLOCKS, "joint_attention_dim": 40, "pooled_projection_dim": 40,
            "axes_dims_rope": [4, 6, 6],
        },
        lambda draw: _tokens(draw, 24, 40),
    ),
    "OvisImageTransformer2DModel": Recipe(
        {
            "in_channels": 24, "out_channels": 24, **_BLOCKS, "joint_attention_dim": 40,
            "axes_dims_rope": _ROPE,
        },
        lambda draw: _tokens(draw, 24, 40),
    ),
}  # fmt: skip
