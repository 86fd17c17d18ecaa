"""Finds the configurations that a command's MODEL argument names, and builds their models.

MODEL is one of

    a diffusers folder       ./Wan2.2, whose model_index.json may name several transformers
    a transformer's folder   ./Wan2.2/transformer_2
    a configuration          ./Wan2.2/transformer/config.json
    a hub id                 Qwen/Qwen-Image, of which only the configurations are downloaded
    Class[:preset]           QwenImageTransformer2DModel:tiny
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omniq_compile.checkpoints.checkpoint_folder import pipeline_components, read_json
from omniq_compile.checkpoints.filling import set_dtypes
from omniq_compile.checkpoints.hub_download import described_folder, may_be_hub_id
from omniq_compile.lowering.errors import CheckpointError, OmniqError, OptionError, hint, unknown
from omniq_compile.models.families import FAMILIES, preset_config, transformer_class

# How alike a setting's name is to a known one to be a misspelling of it.
LIKELY_MEANT = 0.8


@dataclass(frozen=True)
class ModelConfig:
    """A transformer class, what its constructor takes, and the preset whose inputs fit it."""

    name: str
    class_name: str
    arguments: dict[str, Any]
    preset: str = "tiny"


def find_configs(text: str, hub: Mapping[str, Any]) -> list[ModelConfig]:
    """Find what MODEL names; see the head of this file.

    Args:
        text: MODEL.
        hub: HUB_ARGUMENTS that were given.

    Raises:
        OmniqError: there is nothing of that name, or no transformer in it that omniq knows,
            listing what there is and the nearest name.
        CheckpointError: a configuration cannot be read or downloaded.
    """
    path = Path(text)
    if path.is_dir():
        return _of_folder(path)
    if path.exists():  # a shell may name a pipe
        return [_of_file(path)]
    class_name, _, preset = text.partition(":")
    if "/" in text or path.suffix == ".json":
        if may_be_hub_id(text) and path.suffix != ".json":
            return _of_folder(described_folder(text, hub))
        beside = [str(entry) for entry in path.parent.glob("*")]
        raise OmniqError(f"no folder or configuration {text}.{hint(text, beside)}")
    return [_of_preset(text, class_name, preset or "tiny")]


def build_model(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Build a model in eval mode and the dtypes that diffusers loads it in, with no value drawn.

    Call it in a mode whose tensors have none: ``torch.device("meta")`` or ``FakeTensorMode``.

    Raises:
        CheckpointError: the class does not take the configuration.
    """
    kind = transformer_class(config.class_name)
    known = list(inspect.signature(kind.__init__).parameters)
    for key in config.arguments:
        # Diffusers ignores what it does not know, and released configurations hold some of that.
        meant = difflib.get_close_matches(key, known, n=1, cutoff=LIKELY_MEANT)
        if key not in known and meant:
            raise CheckpointError(
                f"{config.name}: {config.class_name} has no setting {key!r}. Did you mean "
                f"{meant[0]!r}?"
            )
    try:
        model: nn.Module = kind.from_config(config.arguments)
    except Exception as error:
        raise CheckpointError(
            f"{config.name}: {config.class_name} cannot be built from this configuration: "
            f"{type(error).__name__}: {error}"
        ) from error
    set_dtypes(
        model, dtype, getattr(model, "_keep_in_fp32_modules", None) or (), stored_buffers=True
    )
    return model.eval()


def _of_folder(folder: Path) -> list[ModelConfig]:
    index = folder / "model_index.json"
    if not index.is_file():
        if not (folder / "config.json").is_file():
            raise OmniqError(
                f"{folder} has no config.json: give a diffusers pipeline folder (with "
                "model_index.json and transformer/) or a transformer's own folder"
            )
        return [_of_file(folder / "config.json")]
    components = {name: kind for name, (_, kind) in pipeline_components(folder).items()}
    names = [name for name, kind in components.items() if kind in FAMILIES]
    if not names:
        found = ", ".join(f"{name} ({kind})" for name, kind in components.items()) or "nothing"
        raise OmniqError(
            f"{index} names no transformer that omniq knows, but {found}; "
            f"omniq knows {', '.join(FAMILIES)}"
        )
    return [_of_file(folder / name / "config.json") for name in names]


def _of_file(path: Path) -> ModelConfig:
    content = read_json(path)
    class_name = content.get("_class_name")
    if class_name is None:
        raise CheckpointError(
            f"{path} has no _class_name, so it is not the config.json of a diffusers model. A "
            "transformer's own is in the transformer/ folder of its pipeline."
        )
    if class_name not in FAMILIES:
        raise OptionError(f"{path} {_wrong_class(str(class_name))}")
    # Of weights that are stored quantized the file says how; the model is the same.
    arguments = {
        key: value
        for key, value in content.items()
        if not key.startswith("_") and key != "quantization_config"
    }
    return ModelConfig(str(path), class_name, arguments)


def _wrong_class(class_name: str) -> str:
    """Word what a config.json is of instead of a transformer that is known."""
    diffusers = importlib.import_module("diffusers")
    kind = getattr(diffusers, class_name, None)
    what = ""
    if isinstance(kind, type):
        bases = {base.__name__ for base in kind.__mro__}
        if "SchedulerMixin" in bases:
            what = "a scheduler"
        elif "DiffusionPipeline" in bases:
            what = "a whole pipeline"
        elif "AutoencoderMixin" in bases or class_name.startswith("Autoencoder"):
            what = "an autoencoder"
    if what:
        return (
            f"is of {class_name}, {what}, and not of a transformer. Valid: {', '.join(FAMILIES)}."
        )
    return f"is of a class that inputs cannot be made up for: {_unknown_class(class_name)}"


def _unknown_class(class_name: str) -> str:
    """Word a class that is not in FAMILIES; one that diffusers has is no slip of the pen."""
    if hasattr(importlib.import_module("diffusers"), class_name):
        return (
            f"{class_name} is a class of diffusers that omniq plan and dump do not know. "
            f"Valid: {', '.join(FAMILIES)}."
        )
    return unknown("transformer class", class_name, FAMILIES)


def _of_preset(text: str, class_name: str, preset: str) -> ModelConfig:
    if class_name not in FAMILIES:
        raise OptionError(
            f"{_unknown_class(class_name)} Give one of them, a diffusers folder, or a config.json."
        )
    return ModelConfig(text, class_name, preset_config(class_name, preset), preset)
