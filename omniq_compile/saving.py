"""Saves quantized models as diffusers folders, whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

import omniq_compile
from omniq_compile.foreign import OWN
from omniq_compile.lowering.errors import CheckpointError
from omniq_compile.lowering.schemes import METHODS
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.option_checks import METHODS_OF
from omniq_compile.state import VERSION, flatten_state


class OmniqQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """What diffusers' ``save_pretrained`` asks to turn a quantized model into plain tensors.

    Checked on diffusers 0.42.
    """

    def __init__(self, quantization_config: dict[str, Any]) -> None:
        """Take the ``quantization_config`` that stands in config.json."""
        super().__init__(quantization_config)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, torch.Tensor], safe_serialization: bool = True
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the parts of every quantized weight as tensors of their own."""
        if not safe_serialization:
            raise CheckpointError("omniq saves to safetensors only: pickle is never used.")
        return flatten_state(state_dict)

    @property
    def is_serializable(self) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def supports_safetensors_serialization(self) -> bool:
        """Whether safetensors can hold it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the quantized weights can be trained."""
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        pass

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        pass


# The options that shape a quantized model, and not only one compile of it.
_STORED_OPTIONS = (
    "method",
    "ignored_layers",
    "min_features",
    "mxfp4_scale_alg",
    "weight_block_size",
    "num_bf16_fallback_layers",
)


def quantization_config(config: QuantConfig) -> dict[str, Any]:
    """Return what config.json says of a quantized model: the options that shaped its weights."""
    options = {name: getattr(config, name) for name in _STORED_OPTIONS}
    return {
        "quant_method": OWN,
        "version": VERSION,
        "omniq_version": omniq_compile.__version__,
        "format": config.scheme.weight,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
    }


def stored_options(model: nn.Module) -> dict[str, Any] | None:
    """Return the options to compile a model with that omniq quantized, or None for another."""
    about = getattr(model, "omniq_quantization", None)
    if about is None and isinstance(model, ModelMixin):
        about = model.config.get("quantization_config")
    if not isinstance(about, Mapping) or about.get("quant_method") != OWN:
        return None
    options = {name: about[name] for name in _STORED_OPTIONS if name in about}
    return {
        name: value
        for name, value in options.items()
        if options["method"] in METHODS_OF.get(name, METHODS) and value is not None
    }


def make_savable(model: nn.Module, about: dict[str, Any]) -> None:
    """Let diffusers' own ``save_pretrained`` save a quantized model; others are left alone."""
    if isinstance(model, ModelMixin):
        model.register_to_config(quantization_config=about)
        model.hf_quantizer = OmniqQuantizer(about)


def write_aside(folder: Path, write: Callable[[Path], None], *, overwrite: bool = False) -> None:
    """Make a folder by writing it beside its place and renaming it, so that it is never half there.

    A folder that an interrupted run left beside it is removed first. What is replaced is moved
    aside too, to ``.NAME.old.*``, and removed when the new folder is in its place: a run that is
    killed between the two leaves it there.

    Raises:
        CheckpointError: the folder is there already, or is a file, or cannot be written (a full
            disk).
    """
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file. Remove it, or choose another folder.")
    if folder.exists() and not overwrite and any(folder.iterdir()):
        raise CheckpointError(f"{folder} exists already. Remove it, or choose another folder.")
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        if folder.exists():
            _replace(folder, aside)
        else:
            aside.rename(folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if _is_a_failed_write(error):
            left = f"{folder} is as it was" if folder.exists() else "Nothing was left"
            raise CheckpointError(f"cannot write {folder}: {error}. {left}.") from error
        raise


def _replace(folder: Path, new: Path) -> None:
    """Put a finished folder in the place of another; where that stops, one of them is there."""
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    old = place / folder.name
    try:
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(place, ignore_errors=True)
    except BaseException:
        # An interruption may come before or after what it seems to come from: only what is there
        # tells how far it went.
        if not folder.exists():
            _put_back(old, folder)
        shutil.rmtree(place, ignore_errors=True)
        raise


def _put_back(old: Path, folder: Path) -> None:
    try:
        old.rename(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}: {error}. The old one is whole, in {old}: move it back."
        ) from error


def _is_a_failed_write(error: BaseException) -> bool:
    # safetensors reports a failed write in an error of its own, with the system's words in it.
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def save_model(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> None:
    """Save one quantized component as diffusers does, whole or not at all.

    Args:
        model: of a diffusers class, from `load_model` or `quantize_`.
        folder: to make.
        overwrite: replace a folder that exists.

    Raises:
        CheckpointError: the folder exists, cannot be written, or the model cannot be saved.
    """
    if not hasattr(model, "hf_quantizer"):
        raise CheckpointError(
            f"{type(model).__name__} was not quantized by omniq, or is not a model of diffusers."
        )
    write_aside(Path(folder), model.save_pretrained, overwrite=overwrite)  # type: ignore[arg-type]
