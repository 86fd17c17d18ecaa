"""Saves quantized models: `save_model`, and what lets `save_pretrained` do it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from torch import nn

from omniq_compile.checkpoints.recorded_options import stored_options
from omniq_compile.checkpoints.written_folder import MODEL, write_aside
from omniq_compile.integrations.diffusers_quantizer import attach_record
from omniq_compile.integrations.saving_transformers import save_pretrained
from omniq_compile.lowering.errors import CheckpointError
from omniq_compile.memory import footprint
from omniq_compile.own_method import OwnMethod


def make_savable(model: nn.Module, about: dict[str, Any]) -> None:
    """Let the ``save_pretrained`` of diffusers and transformers save a quantized model.

    Models of other libraries are left alone.
    """
    if isinstance(model, ModelMixin):
        # Several ControlNets are saved as a model each.
        for part in getattr(model, "nets", [model]):
            attach_record(part, about)
    elif _is_of_transformers(model):
        from omniq_compile.integrations.transformers_quantizer import (
            OmniqHfQuantizer,
            TransformersConfig,
        )

        model.omniq_quantization = about  # type: ignore[assignment]
        # For the model's dequantize().
        model.hf_quantizer = OmniqHfQuantizer(TransformersConfig.from_dict(about))
        # Unlike a closure or a bound method, it comes back right from copying and pickling, and
        # unlike an OwnMethod it keeps a model without a name: load(...).save_pretrained(...).
        model.save_pretrained = partial(save_pretrained, model)  # type: ignore[assignment]
        model.get_memory_footprint = OwnMethod(footprint, model)  # type: ignore[assignment]


def _is_of_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def save_model(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> None:
    """Save one quantized component as diffusers does, whole or not at all.

    Args:
        model: of a class of diffusers or transformers, from `load_model`, `from_pretrained` or
            `quantize_`.
        folder: to make.
        overwrite: replace the folder of a model; a pipeline's, or any other, is never replaced.

    Raises:
        CheckpointError: the folder exists, cannot be written, or the model cannot be saved.
    """
    if stored_options(model) is None:
        raise CheckpointError(
            f"{type(model).__name__} was not quantized by omniq, or is not a model of diffusers or "
            "transformers."
        )
    write: Any = model.save_pretrained
    write_aside(Path(folder), write, MODEL, overwrite=overwrite)
