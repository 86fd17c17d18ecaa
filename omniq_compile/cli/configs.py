"""Builds a model from its configuration alone: every tensor has a shape and a dtype, no values."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from omniq_compile.cli.families import PRESETS
from omniq_compile.cli.model_configs import find_configs
from omniq_compile.cli.models import LoadedModel, make_inputs, preset_config, preset_of, resolve
from omniq_compile.lowering.errors import OmniqError, hint


def resolve_shapes(text: str, *, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """Find the model that MODEL names, as `resolve` does, but load or draw no weights.

    A ``config.json`` can be named too; of a pipeline with several transformers the first one is
    meant. Models of ``module:function`` are what the function makes.

    Raises:
        OmniqError: nothing of that name, or not a transformer that inputs can be made up for.
    """
    if Path(text).is_dir() or Path(text).suffix == ".json":
        found = find_configs(text)[0]
        # Of weights that are stored quantized the config says how; the model is the same.
        unused = {key for key in found.arguments if key.startswith("_")} | {"quantization_config"}
        config = {key: value for key, value in found.arguments.items() if key not in unused}
        return _build(found.name, found.class_name, config, "tiny", dtype)
    named = preset_of(text)
    if named is None:
        return resolve(text, dtype=dtype)
    class_name, preset = named
    return _build(text, class_name, preset_config(class_name, preset), preset, dtype)


def _build(
    name: str, class_name: str, config: Mapping[str, Any], preset: str, dtype: torch.dtype
) -> LoadedModel:
    cls = getattr(importlib.import_module("diffusers"), class_name, None)
    if cls is None:
        raise OmniqError(f"the installed diffusers has no {class_name}: upgrade diffusers")
    known = inspect.signature(cls.__init__).parameters
    for key in config:
        if key not in known:
            raise OmniqError(f"{name}: {class_name} has no setting {key!r}.{hint(key, known)}")
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
