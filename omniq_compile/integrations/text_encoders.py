"""Models of transformers, such as text encoders: quantized while they load, and loaded again.

transformers 5 quantizes them as it reads them (`transformers_quantizer`). With version 4 a model is
loaded in BF16 first, and a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from omniq_compile.checkpoints.checkpoint_folder import read_config
from omniq_compile.checkpoints.filling import fill_stored, set_dtypes
from omniq_compile.checkpoints.foreign import refuse_foreign
from omniq_compile.checkpoints.recorded_options import check_stored
from omniq_compile.checkpoints.safetensors_files import SafetensorsFiles
from omniq_compile.checkpoints.saving import make_savable
from omniq_compile.checkpoints.without_values import parameters_without_values
from omniq_compile.lowering.errors import CheckpointError
from omniq_compile.passes.config import QuantConfig
from omniq_compile.quantize_weights import quantize_

logger = logging.getLogger("omniq")


def load_quantized(
    cls: Any,
    folder: Path,
    options: Mapping[str, Any] | QuantConfig | None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> Any:
    """Load a model of transformers, each weight quantized as it is read.

    Args:
        cls: of transformers.
        folder: of the model, in full precision or saved by `saving_transformers`.
        options: see `QuantConfig`; None for a folder of `saving_transformers`.
        dtype: of what is not quantized, and of the weights before they are.
        device: to load on.
        variant: of the files, such as ``"fp16"``.

    Raises:
        CheckpointError: the folder cannot be read, or holds weights that others quantized.
        OptionError: the options do not fit what the folder was quantized with.
        WeightError: a weight holds NaN or Inf; the message names its layer.
    """
    about = read_config(folder)
    refuse_foreign(folder, about, None)
    config = None if options is None else QuantConfig.from_options(options)
    stored = about.get("quantization_config")
    if stored is not None:
        check_stored(folder, stored, options)
        return _load_stored(cls, folder, dtype, torch.device(device), variant)
    if config is None:
        raise CheckpointError(f"{folder} is not quantized: say how with options.")
    device = torch.device(device)
    streaming: dict[str, Any] = {}
    if _has_conversions():
        from omniq_compile.integrations.transformers_quantizer import TransformersConfig

        streaming = {"quantization_config": TransformersConfig.of(config)}
        if device.type != "cpu":
            streaming["device_map"] = {"": device}
    else:
        logger.warning("transformers is older than 5: %s is loaded in BF16 first", folder)
    try:
        model = cls.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, variant=variant, **streaming
        )
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be loaded from safetensors: {error}") from error
    if not streaming:
        quantize_(model.to(device).requires_grad_(False), config)
    return model.eval()


def _load_stored(
    cls: Any, folder: Path, dtype: torch.dtype, device: torch.device, variant: str | None
) -> Any:
    about = cls.config_class.from_pretrained(folder)
    stored = dict(about.quantization_config)
    del about.quantization_config
    about.dtype = dtype
    with parameters_without_values():
        model = cls(about)
    set_dtypes(model, dtype, kept_in_float32(model, dtype), stored_buffers=False)
    model.tie_weights()
    fill_stored(model, SafetensorsFiles(folder, variant), stored, dtype, {"": device})
    model.tie_weights()
    model.requires_grad_(False)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    model = model.to(device).eval()
    make_savable(model, stored)
    return model


def kept_in_float32(model: Any, dtype: torch.dtype) -> set[str]:
    """Return the modules that transformers' own loading keeps in float32 for a dtype."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        return kept | set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept if dtype is torch.bfloat16 else set()


def _has_conversions() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5
