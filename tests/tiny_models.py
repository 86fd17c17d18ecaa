"""Models of the four families in the preset "tiny", with random weights, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from omniq_compile.models.families import PRESETS
from omniq_compile.models.random_models import make_inputs, random_model


@dataclass(frozen=True)
class TinyModel:
    """A model and what to call it with."""

    model: nn.Module
    inputs: dict[str, Any]

    def run(self) -> Any:
        return self.model(**self.inputs)


def tiny_model(class_name: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> TinyModel:
    model = random_model(class_name, "tiny", dtype=dtype, seed=seed)
    image, text = PRESETS["tiny"].image_tokens, PRESETS["tiny"].text_tokens
    return TinyModel(
        model, make_inputs(model, image_tokens=image, text_tokens=text, dtype=dtype, seed=seed)
    )
