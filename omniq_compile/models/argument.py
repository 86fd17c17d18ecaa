"""Finds the model that MODEL names for ``omniq dump``, and inputs for it, without any weights.

MODEL is ``module:function``, a function that makes both, or what `configs` finds: then every
tensor has a shape and a dtype, and no values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from omniq_compile.lowering.errors import OptionError
from omniq_compile.models.configs import ModelConfig, build_model, find_configs
from omniq_compile.models.families import PRESETS
from omniq_compile.models.function import LoadedModel, call_function
from omniq_compile.models.random_models import make_inputs


def find_model(
    text: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    hub: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Find the model that MODEL names; of a pipeline with several transformers the first.

    Inputs are those of the preset, for a configuration of "tiny".

    Args:
        text: MODEL.
        dtype: of weights and inputs.
        hub: arguments of a download, see `hub_download`.

    Raises:
        OmniqError: nothing of that name, listing what there is and the nearest name; or not a
            transformer that inputs can be made up for.
    """
    if _is_function(text):
        return call_function(text)
    config = _first_config(text, hub or {})
    size = PRESETS[config.preset]
    # Tensors without values, which Dynamo traces like others.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(config, dtype)
        inputs = make_inputs(
            model, image_tokens=size.image_tokens, text_tokens=size.text_tokens, dtype=dtype
        )
    return LoadedModel(config.name, model, inputs)


def _first_config(text: str, hub: Mapping[str, Any]) -> ModelConfig:
    try:
        return find_configs(text, hub)[0]
    except OptionError as error:
        raise OptionError(
            f"{error} Or write a function that returns a model and its inputs, and name it as "
            "module:function."
        ) from error


def _is_function(text: str) -> bool:
    """Tell ``module:function`` from a path and from ``Class:preset``."""
    module, colon, _ = text.rpartition(":")
    is_class = module[:1].isupper() and "." not in module
    return bool(module and colon) and not is_class and "/" not in module and not Path(text).exists()
