"""Image models whose blocks see tokens or patches of one picture, and text."""

from __future__ import annotations

from typing import Any

import torch

from zoo.recipe import BATCH, Draw, Recipe, grid, prefixed

_HEADS = {"attention_head_dim": 16, "num_attention_heads": 4}


def _picture(draw: Draw, channels: int, text: int, scale: float = 1000) -> dict[str, Any]:
    return {
        "hidden_states": draw(BATCH, channels, 8, 10),
        "encoder_hidden_states": draw(BATCH, 7, text),
        "timestep": draw.time(0.7 * scale),
    }


def _sizes(draw: Draw) -> dict[str, Any]:
    return {
        "original_size": torch.tensor([[64.0, 80.0]] * BATCH),
        "target_size": torch.tensor([[64.0, 80.0]] * BATCH),
        "crop_coords": torch.zeros(BATCH, 2),
    }


def _without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


RECIPES = {
    "QwenImageTransformer2DModel": Recipe(
        {
            "in_channels": 24, "out_channels": 6, "num_layers": 2, **_HEADS,
            "joint_attention_dim": 40, "axes_dims_rope": (4, 6, 6),
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 20, 24),
            "encoder_hidden_states": draw(BATCH, 7, 40),
            "timestep": draw.time(0.7),
            "img_shapes": [[(1, 4, 5)]] * BATCH,
        },
    ),
    "QwenImage21Transformer2DModel": Recipe(
        {
            "in_channels": 24, "out_channels": 24, "num_layers": 2, **_HEADS,
            "context_in_dim": 40, "axes_dims_rope": (4, 6, 6),
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 16, 24),
            "encoder_hidden_states": draw(BATCH, 7, 40),
            "encoder_hidden_states_mask": torch.ones(BATCH, 7, dtype=torch.long),
            "timestep": draw.time(0.7),
            "img_shapes": [[(1, 4, 4)]] * BATCH,
            # One slot of the text for each 2 x 2 latents.
            "img_mask": torch.tensor([[False] * 7 + [True] * 4] * BATCH),
        },
    ),
    "SD3Transformer2DModel": Recipe(
        {
            "sample_size": 12, "in_channels": 6, "out_channels": 6, "num_layers": 3, **_HEADS,
            "joint_attention_dim": 40, "caption_projection_dim": 64, "pooled_projection_dim": 36,
            "pos_embed_max_size": 12, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        lambda draw: _picture(draw, 6, 40) | {"pooled_projections": draw(BATCH, 36)},
    ),
    "AuraFlowTransformer2DModel": Recipe(
        {
            "sample_size": 12, "in_channels": 6, "out_channels": 6, "num_mmdit_layers": 2,
            "num_single_dit_layers": 2, **_HEADS, "joint_attention_dim": 40,
            "caption_projection_dim": 64, "pos_embed_max_size": 64,
        },
        lambda draw: _picture(draw, 6, 40, 1),
    ),
    "ZImageTransformer2DModel": Recipe(
        {
            "in_channels": 6, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4,
            "n_kv_heads": 4, "cap_feat_dim": 40, "axes_dims": [4, 6, 6],
            "axes_lens": [64, 32, 32],
        },
        lambda draw: {
            "x": [draw(6, 1, 8, 10) for _ in range(BATCH)],
            "t": draw.time(0.7),
            "cap_feats": [draw(7, 40) for _ in range(BATCH)],
        },
    ),
    "BriaFibo2Transformer2DModel": Recipe(
        {
            "in_channels": 6, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4,
            "cap_feat_dim": 40, "injection_layer_ids": (1,), "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 4,
            "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": (4, 6, 6),
            "axes_lens": (32, 32, 32),
        },
        lambda draw: _picture(draw, 6, 40, 1) | {"encoder_hidden_states": draw(BATCH, 2, 7, 40)},
    ),
    "Lumina2Transformer2DModel": Recipe(
        {
            "sample_size": 12, "in_channels": 6, "hidden_size": 64, "num_layers": 2,
            "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2,
            "multiple_of": 16, "axes_dim_rope": (4, 6, 6), "axes_lens": (32, 32, 32),
            "cap_feat_dim": 40,
        },
        lambda draw: _picture(draw, 6, 40, 1)
        | {"encoder_attention_mask": torch.ones(BATCH, 7, dtype=torch.bool)},
    ),
    "LuminaNextDiT2DModel": Recipe(
        {
            "sample_size": 8, "in_channels": 6, "hidden_size": 64, "num_layers": 2,
            "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16,
            "cross_attention_dim": 40,
        },
        lambda draw: _picture(draw, 6, 40, 1)
        | {
            "encoder_mask": torch.ones(BATCH, 7),
            # Unit complex numbers by row, column and pair of channels.
            "image_rotary_emb": torch.polar(torch.ones(32, 32, 8), draw.uniform(32, 32, 8)),
            "cross_attention_kwargs": {},
        },
    ),
    "HunyuanImageTransformer2DModel": Recipe(
        {
            "in_channels": 6, "out_channels": 6, **_HEADS, "num_layers": 2,
            "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": (1, 1),
            "text_embed_dim": 40, "text_embed_2_dim": 36, "rope_axes_dim": (8, 8),
            "guidance_embeds": True,
        },
        lambda draw: _picture(draw, 6, 40)
        | {
            "encoder_attention_mask": torch.ones(BATCH, 7),
            "encoder_hidden_states_2": draw(BATCH, 5, 36),
            "encoder_attention_mask_2": torch.ones(BATCH, 5),
            "guidance": draw.time(4.0),
        },
        not_traced=("proj_out",),
    ),
    "HunyuanDiT2DModel": Recipe(
        {
            **_HEADS, "in_channels": 6, "patch_size": 2, "sample_size": 8, "hidden_size": 64,
            "num_layers": 2, "cross_attention_dim": 40, "cross_attention_dim_t5": 48,
            "pooled_projection_dim": 32, "text_len": 7, "text_len_t5": 5,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 6, 8, 8),
            "timestep": draw.time(700.0),
            "encoder_hidden_states": draw(BATCH, 7, 40),
            "text_embedding_mask": torch.ones(BATCH, 7),
            "encoder_hidden_states_t5": draw(BATCH, 5, 48),
            "text_embedding_mask_t5": torch.ones(BATCH, 5),
            "image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0]] * BATCH).float(),
            "style": torch.zeros(BATCH, dtype=torch.long),
            "image_rotary_emb": draw.rotary(16, 16),
        },
    ),
    "CogView3PlusTransformer2DModel": Recipe(
        {
            "in_channels": 6, "out_channels": 6, "num_layers": 2, **_HEADS, "text_embed_dim": 40,
            "time_embed_dim": 48, "condition_dim": 16, "pos_embed_max_size": 16,
            "sample_size": 16,
        },
        lambda draw: _picture(draw, 6, 40) | _sizes(draw),
    ),
    "CogView4Transformer2DModel": Recipe(
        {
            "in_channels": 6, "out_channels": 6, "num_layers": 2, **_HEADS, "text_embed_dim": 40,
            "time_embed_dim": 48, "condition_dim": 16, "sample_size": 16,
            "rope_axes_dim": (16, 16),
        },
        lambda draw: _picture(draw, 6, 40) | _sizes(draw),
    ),
    "GlmImageTransformer2DModel": Recipe(
        {
            "in_channels": 6, "out_channels": 6, "num_layers": 2, **_HEADS, "text_embed_dim": 40,
            "time_embed_dim": 48, "condition_dim": 16, "prior_vq_quantizer_codebook_size": 64,
        },
        lambda draw: _without(_picture(draw, 6, 40) | _sizes(draw), "original_size")
        | {
            "prior_token_id": draw.integers(64, BATCH, 20),
            "prior_token_drop": torch.zeros(BATCH, 20, dtype=torch.bool),
        },
    ),
    "HiDreamImageTransformer2DModel": Recipe(
        {
            "patch_size": 2, "in_channels": 6, "out_channels": 6, "num_layers": 1,
            "num_single_layers": 1, **_HEADS, "caption_channels": [40, 36], "text_emb_dim": 32,
            "num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 6, 6),
            "max_resolution": (16, 16), "llama_layers": (0, 1), "force_inference_output": True,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 6, 8, 8),
            "encoder_hidden_states_t5": draw(BATCH, 7, 40),
            "encoder_hidden_states_llama3": draw(2, BATCH, 7, 36),
            "pooled_embeds": draw(BATCH, 32),
            "timesteps": draw.time(700.0),
        },
    ),
    "NucleusMoEImageTransformer2DModel": Recipe(
        {
            "in_channels": 24, "out_channels": 6, "num_layers": 2, **_HEADS,
            "joint_attention_dim": 40, "axes_dims_rope": (4, 6, 6), "moe_enabled": True,
            "dense_moe_strategy": "leave_first_block_dense", "num_experts": 2,
            "moe_intermediate_dim": 48, "capacity_factors": [2.0, 2.0],
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 20, 24),
            "img_shapes": [(1, 4, 5)] * BATCH,
            "encoder_hidden_states": draw(BATCH, 7, 40),
            "encoder_hidden_states_mask": torch.ones(BATCH, 7, dtype=torch.long),
            "timestep": draw.time(0.7),
        },
        not_traced=("img_in", "proj_out"),
    ),
    "Ideogram4Transformer2DModel": Recipe(
        {
            "in_channels": 24, "num_layers": 2, **_HEADS, "intermediate_size": 96,
            "adaln_dim": 48, "llm_features_dim": 40, "rope_theta": 10_000,
            "mrope_section": (4, 2, 2),
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 27, 24),
            "encoder_hidden_states": draw(BATCH, 27, 40),
            "timestep": draw.time(0.7),
            # Seven of text, then a picture, which starts at position 65536.
            "position_ids": torch.cat(
                [torch.arange(7)[:, None].expand(7, 3), prefixed(grid(4, 5), 1) + 65536]
            ).expand(BATCH, 27, 3),
            "segment_ids": torch.ones(BATCH, 27, dtype=torch.long),
            "indicator": torch.tensor([[3] * 7 + [2] * 20] * BATCH),
        },
    ),
    "Krea2Transformer2DModel": Recipe(
        {
            "in_channels": 24, "num_layers": 2, **_HEADS, "num_key_value_heads": 2,
            "intermediate_size": 96, "timestep_embed_dim": 32, "text_hidden_dim": 48,
            "num_text_layers": 3, "text_num_attention_heads": 3,
            "text_num_key_value_heads": 3, "text_intermediate_size": 80,
            "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 20, 24),
            "encoder_hidden_states": draw(BATCH, 7, 3, 48),
            "timestep": draw.time(0.7),
            "position_ids": torch.cat([torch.zeros(7, 3).long(), prefixed(grid(4, 5), 1)]),
        },
    ),
    "ErnieImageTransformer2DModel": Recipe(
        {
            "hidden_size": 64, "num_attention_heads": 4, "num_layers": 2, "ffn_hidden_size": 96,
            "in_channels": 24, "out_channels": 24, "text_in_dim": 40,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda draw: _without(_picture(draw, 24, 40), "encoder_hidden_states")
        | {"text_bth": draw(BATCH, 7, 40), "text_lens": torch.tensor([7, 5])},
    ),
    "PRXTransformer2DModel": Recipe(
        {
            "in_channels": 6, "context_in_dim": 40, "hidden_size": 64, "mlp_ratio": 2.0,
            "num_heads": 4, "depth": 2, "axes_dim": [8, 8],
        },
        lambda draw: _picture(draw, 6, 40, 1),
    ),
    "OmniGenTransformer2DModel": Recipe(
        {
            "in_channels": 6, "hidden_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 4, "intermediate_size": 96, "num_layers": 2,
            "pad_token_id": 0, "vocab_size": 100, "time_step_dim": 32, "pos_embed_max_size": 16,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 6, 8, 8),
            "timestep": draw.time(0.7),
            "input_ids": draw.integers(100, BATCH, 24),
            "input_img_latents": [draw(1, 6, 8, 8)],
            "input_image_sizes": {0: [[0, 16]]},
            "attention_mask": draw.ones(BATCH, 41, 41),
            "position_ids": torch.arange(41).expand(BATCH, 41),
        },
    ),
    "JoyImageEditTransformer3DModel": Recipe(
        {
            "in_channels": 6, "hidden_size": 64, "num_attention_heads": 4, "text_dim": 40,
            "num_layers": 2, "rope_dim_list": [4, 6, 6],
        },
        lambda draw: _picture(draw, 6, 40) | {"hidden_states": draw(BATCH, 2, 6, 1, 8, 10)},
    ),
    "JoyImageEditPlusTransformer3DModel": Recipe(
        {
            "in_channels": 6, "hidden_size": 64, "num_attention_heads": 4, "text_dim": 40,
            "num_layers": 2, "rope_dim_list": [4, 6, 6],
        },
        lambda draw: _picture(draw, 6, 40)
        | {
            "hidden_states": draw(BATCH, 26, 6, 1, 2, 2),
            "shape_list": [[(1, 4, 5), (1, 2, 3)]] * BATCH,
        },
    ),
}  # fmt: skip
