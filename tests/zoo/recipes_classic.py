"""The older classes: class or text conditions, cross-attention, a transformer inside a U-Net."""

from __future__ import annotations

import torch

from zoo.recipe import BATCH, Draw, Recipe

_HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}


def _film_inputs(draw: Draw) -> dict[str, object]:
    return {
        "encodings_and_masks": [(draw(BATCH, 7, 64), torch.ones(BATCH, 7))],
        "decoder_input_tokens": draw(BATCH, 12, 24),
        "decoder_noise_time": torch.tensor([0.7, 0.3]),
    }


RECIPES = {
    "DiTTransformer2DModel": Recipe(
        {
            **_HEADS, "in_channels": 6, "out_channels": 12, "num_layers": 2, "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 6, 8, 8),
            "timestep": torch.tensor([7, 3]),
            "class_labels": torch.tensor([1, 4]),
        },
    ),
    "PixArtTransformer2DModel": Recipe(
        {
            **_HEADS, "in_channels": 6, "out_channels": 12, "num_layers": 2,
            "cross_attention_dim": 64, "sample_size": 8, "caption_channels": 40,
            "use_additional_conditions": False,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 6, 8, 8),
            "encoder_hidden_states": draw(BATCH, 7, 40),
            "timestep": draw.time(700.0),
            "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
        },
    ),
    "SanaTransformer2DModel": Recipe(
        {
            "in_channels": 6, "out_channels": 6, **_HEADS, "num_layers": 2,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 32,
            "cross_attention_dim": 64, "caption_channels": 40, "sample_size": 8,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 6, 8, 10),
            "encoder_hidden_states": draw(BATCH, 7, 40),
            "timestep": draw.time(700.0),
        },
    ),
    "PriorTransformer": Recipe(
        {
            **_HEADS, "num_layers": 2, "embedding_dim": 40, "num_embeddings": 7,
            "additional_embeddings": 4,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 40),
            "timestep": torch.tensor([7, 3]),
            "proj_embedding": draw(BATCH, 40),
            "encoder_hidden_states": draw(BATCH, 7, 40),
        },
    ),
    "Transformer2DModel": Recipe(
        {
            **_HEADS, "in_channels": 32, "num_layers": 2, "norm_num_groups": 8,
            "cross_attention_dim": 40, "use_linear_projection": True,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 32, 4, 5),
            "encoder_hidden_states": draw(BATCH, 7, 40),
        },
    ),
    "DreamLiteTransformer2DModel": Recipe(
        {
            **_HEADS, "in_channels": 32, "num_layers": 2, "norm_num_groups": 8,
            "cross_attention_dim": 40, "use_linear_projection": True, "qk_norm": "rms_norm",
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 32, 4, 5),
            "encoder_hidden_states": draw(BATCH, 7, 40),
        },
    ),
    "TransformerTemporalModel": Recipe(
        {**_HEADS, "in_channels": 32, "num_layers": 2, "norm_num_groups": 8,
         "cross_attention_dim": 40, "double_self_attention": False},
        lambda draw: {
            "hidden_states": draw(BATCH * 3, 32, 4, 5),
            "encoder_hidden_states": draw(BATCH * 4 * 5, 7, 40),
            "num_frames": 3,
        },
    ),
    "T5FilmDecoder": Recipe(
        {
            "input_dims": 24, "targets_length": 12, "d_model": 64, "num_layers": 2,
            "num_heads": 4, "d_kv": 16, "d_ff": 96,
        },
        _film_inputs,
        # T5 does not divide by the square root of the head's width; its weights do.
        scales={"to_q": 0.25},
    ),
    "MiniMaxMusic3RVQDepthDecoder": Recipe(
        {
            "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 96, "audio_vocab_size": 50, "num_codebooks": 4,
        },
        lambda draw: {"inputs_embeds": draw(BATCH, 5, 64)},
    ),
}  # fmt: skip
