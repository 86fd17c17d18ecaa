"""Saves quantized models of transformers: config.json, and one safetensors file of omniq's own."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from omniq_compile.checkpoints.saving_checks import refuse_adapters
from omniq_compile.checkpoints.state import flatten_state
from omniq_compile.lowering.errors import CheckpointError

# Not transformers' name: it would take the file for its own, find none of the quantized weights in
# it, and go on with random ones.
WEIGHTS = "omniq_model.safetensors"


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    safe_serialization: bool = True,
    variant: str | None = None,
    push_to_hub: bool = False,
    **unused: Any,
) -> None:
    """Save a quantized model where its class's ``save_pretrained`` would, which cannot.

    Args:
        model: quantized by omniq.
        save_directory: to write into.
        safe_serialization: as pipelines pass it.
        variant: of the file, such as ``"fp16"``.
        push_to_hub: not done.
        unused: what else transformers takes, such as a shard size: all is one file.

    Raises:
        CheckpointError: pickle or a push to the hub is asked for, or an adapter is loaded.
    """
    if not safe_serialization:
        raise CheckpointError("omniq saves to safetensors only: pickle is never used.")
    if push_to_hub:
        raise CheckpointError(
            f"a quantized {type(model).__name__} is not pushed while it is saved. Save it to a "
            "folder, and upload that."
        )
    save_quantized(model, Path(save_directory), variant)


def save_quantized(model: Any, folder: Path, variant: str | None = None) -> None:
    """Write config.json and one safetensors file, which `load_quantized` reads as they are.

    Raises:
        CheckpointError: the model was not quantized by omniq, or has an adapter loaded.
    """
    about = getattr(model, "omniq_quantization", None)
    if about is None:
        raise CheckpointError(f"{type(model).__name__} was not quantized by omniq.")
    state = model.state_dict()
    refuse_adapters(state)
    tensors, metadata = flatten_state(state)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.quantization_config = about
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    stem, suffix = WEIGHTS.split(".")
    name = f"{stem}.{variant}.{suffix}" if variant else WEIGHTS
    safetensors.torch.save_file(_without_copies(tensors), folder / name, metadata)


def _without_copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out all but the first name of tied weights: safetensors stores no memory twice."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: tensors[name].contiguous() for name in first.values()}
