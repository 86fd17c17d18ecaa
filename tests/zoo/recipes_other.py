"""Models of sound, and of molecules."""

from __future__ import annotations

from typing import Any

import torch

from zoo.recipe import BATCH, Draw, Recipe


def _proteina(draw: Draw) -> dict[str, Any]:
    none = torch.zeros(BATCH, 9, dtype=torch.bool)
    return {
        "bb_ca": draw(BATCH, 9, 3).float(),
        "local_latents": draw(BATCH, 9, 20).float(),
        "bb_ca_time": torch.tensor([0.7, 0.3]),
        "local_latents_time": torch.tensor([0.6, 0.2]),
        "padding_mask": torch.ones(BATCH, 9, dtype=torch.bool),
        "token_type": torch.zeros(BATCH, 9, dtype=torch.long),
        "conditioning": {
            "is_in_context_conditioning": none,
            "supports_local_latent": ~none,
        },
    }


RECIPES = {
    "AceStepTransformer1DModel": Recipe(
        {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "in_channels": 36, "audio_acoustic_hidden_dim": 12, "sliding_window": 8,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 20, 12),
            "timestep": draw.time(0.7),
            "timestep_r": draw.time(0.4),
            "encoder_hidden_states": draw(BATCH, 7, 64),
            "context_latents": draw(BATCH, 20, 24),
        },
    ),
    "StableAudioDiTModel": Recipe(
        {
            "sample_size": 12, "in_channels": 6, "out_channels": 6, "num_layers": 2,
            "attention_head_dim": 16, "num_attention_heads": 4,
            "num_key_value_attention_heads": 2, "cross_attention_dim": 48, "time_proj_dim": 16,
            "global_states_input_dim": 36, "cross_attention_input_dim": 40,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 6, 12),
            "timestep": draw.time(0.7),
            "encoder_hidden_states": draw(BATCH, 7, 40),
            "global_hidden_states": draw(BATCH, 1, 36),
            "rotary_embedding": draw.rotary(13, 8),
        },
    ),
    "StableAudio3DiTModel": Recipe(
        {
            "io_channels": 12, "embed_dim": 64, "depth": 2, "num_heads": 2,
            "cond_token_dim": 40, "global_cond_dim": 36, "local_add_cond_dim": 13,
            "timestep_features_dim": 16, "ff_mult": 2.0, "num_memory_tokens": 3,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 12, 20),
            "timestep": draw.time(0.7),
            "encoder_hidden_states": draw(BATCH, 7, 40),
            "global_hidden_states": draw(BATCH, 36),
            "local_add_cond": draw(BATCH, 13, 20),
        },
    ),
    "LongCatAudioDiTTransformer": Recipe(
        {"dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 40, "latent_dim": 12},
        lambda draw: {
            "hidden_states": draw(BATCH, 20, 12),
            "encoder_hidden_states": draw(BATCH, 7, 40),
            "encoder_attention_mask": torch.ones(BATCH, 7, dtype=torch.bool),
            "timestep": draw.time(0.7),
            "attention_mask": torch.ones(BATCH, 20, dtype=torch.bool),
            "latent_cond": draw(BATCH, 20, 12),
        },
        # Eight residual branches in a row before the text meets the sound.
        scales={"pwconv2": 1 / 3},
    ),
    "MiniMaxMusic3Transformer1DModel": Recipe(
        {
            "in_channels": 12, "condition_dim": 40, "num_layers": 2, "num_attention_heads": 4,
            "attention_head_dim": 16, "ff_inner_dim": 96, "rotary_dim": 8,
            "fourier_embedding_dim": 32,
        },
        lambda draw: {
            "hidden_states": draw(BATCH, 12, 20),
            "timestep": draw.time(0.7),
            "encoder_hidden_states": draw(BATCH, 20, 40),
        },
    ),
    "RFD4ProteinaTransformer": Recipe(
        {
            "nlayers": 2, "token_dim": 64, "nheads": 4, "dim_cond": 48, "pair_repr_dim": 40,
            "latent_dim": 20, "t_emb_dim": 32, "tri_mult_c": 36,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask", "bond_order"),
        },
        _proteina,
    ),
}  # fmt: skip
