"""A tiny FLUX transformer for what is tested around a model: adapters, hooks, long use, threads."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from zoo.weights import build

CONFIG = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 4, "joint_attention_dim": 40, "pooled_projection_dim": 36,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
# Small enough a limit for a model 64 wide, and larger than a small LoRA's rank.
OPTIONS = {"method": "int8", "min_features": 16, "compiler": "eager"}


def tiny_flux(**config: Any) -> Any:
    return build(diffusers.FluxTransformer2DModel, CONFIG | config)


def inputs(
    rows: int = 4, columns: int = 5, batch: int = 1, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    return {
        "hidden_states": draw(batch, rows * columns, 16),
        "encoder_hidden_states": draw(batch, text, 40),
        "pooled_projections": draw(batch, 36),
        "timestep": torch.full((batch,), 0.5, dtype=torch.bfloat16),
        "img_ids": grid.float(),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }
