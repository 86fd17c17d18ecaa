"""Builds a model from its configuration alone: every tensor has a shape and a dtype, no values."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from omniq_compile.cli.families import FAMILIES, PRESETS
from omniq_compile.cli.models import LoadedModel, make_inputs, preset_config, preset_of, resolve
from omniq_compile.lowering.errors import OmniqError, nearest, unknown


def resolve_shapes(text: str, *, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """Find the model that MODEL names, as `resolve` does, but load or draw no weights.

    A ``config.json`` can be named too. Models of ``module:function`` are what the function makes.

    Raises:
        OmniqError: nothing of that name, or not a transformer that inputs can be made up for.
    """
    path = Path(text)
    if path.is_dir():
        return _from_file(text, _config_of(path), dtype)
    if path.suffix == ".json":
        if not path.is_file():
            raise OmniqError(f"no file {text}")
        return _from_file(text, path, dtype)
    found = preset_of(text)
    if found is None:
        return resolve(text, dtype=dtype)
    class_name, preset = found
    config = preset_config(class_name, preset)
    return _build(text, class_name, config, preset, dtype)


def _config_of(folder: Path) -> Path:
    if (folder / "model_index.json").is_file():
        index = _read(folder / "model_index.json")
        if not (folder / "transformer").is_dir():
            names = [n for n, v in index.items() if isinstance(v, list) and v and v[0]]
            raise OmniqError(
                f"the pipeline in {folder} has no transformer/ folder. Its components are: "
                f"{', '.join(names) or 'none'}. Name the folder of one that is a transformer."
            )
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        raise OmniqError(
            f"{folder} has no config.json: give a diffusers pipeline folder (with "
            "model_index.json and transformer/) or a transformer's own folder"
        )
    return folder / "config.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OmniqError(f"cannot read {file}: {error.strerror}.") from error
    except ValueError as error:
        raise OmniqError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise OmniqError(f"{file} holds {type(found).__name__}, and a configuration is an object.")
    return found


def _from_file(name: str, file: Path, dtype: torch.dtype) -> LoadedModel:
    config = _read(file)
    class_name = config.get("_class_name")
    if not isinstance(class_name, str):
        raise OmniqError(
            f"{file} has no _class_name, so it is not the config.json of a diffusers model. A "
            "transformer's own is in the transformer/ folder of its pipeline."
        )
    if class_name not in FAMILIES:
        raise OmniqError(f"{file} {_wrong_class(class_name)}")
    arguments = {k: v for k, v in config.items() if not k.startswith("_")}
    # Of weights that are stored quantized the config says how; the model is the same.
    arguments.pop("quantization_config", None)
    return _build(name, class_name, arguments, "tiny", dtype)


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
    return (
        f"is of a class that inputs cannot be made up for: "
        f"{unknown('transformer class', class_name, FAMILIES)} For another one write a function "
        "that returns the model and its inputs, and name it as module:function."
    )


def _build(
    name: str, class_name: str, config: Mapping[str, Any], preset: str, dtype: torch.dtype
) -> LoadedModel:
    cls = getattr(importlib.import_module("diffusers"), class_name, None)
    if cls is None:
        raise OmniqError(f"the installed diffusers has no {class_name}: upgrade diffusers")
    known = inspect.signature(cls.__init__).parameters
    for key in config:
        if key not in known:
            close = nearest(key, known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise OmniqError(f"{name}: {class_name} has no setting {key!r}.{hint}")
    # Tensors without values, which Dynamo traces like others.
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            model: nn.Module = cls(**config)
        except Exception as error:
            raise OmniqError(
                f"{name}: {class_name} cannot be made with these settings: "
                f"{type(error).__name__}: {error}"
            ) from error
        _set_dtype(model, dtype)
        size = PRESETS[preset]
        inputs = make_inputs(
            model, image_tokens=size.image_tokens, text_tokens=size.text_tokens, dtype=dtype
        )
    return LoadedModel(name, model.eval(), inputs)


def _set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters the dtype that diffusers loads them in, and turn their gradients off."""
    in_float32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            keep = not in_float32.isdisjoint([*path.split("."), name])
            value = torch.empty(parameter.shape, dtype=torch.float32 if keep else dtype)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
