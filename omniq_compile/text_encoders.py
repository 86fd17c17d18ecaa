"""Models of transformers, such as text encoders: quantized while they load, saved, loaded again.

Uses transformers' interface for quantizers (``HfQuantizer``, ``register_quantizer`` and
``ConversionOps``), checked on transformers 5.24. Version 4 has another one: there a model is loaded
in BF16 first, and a warning says so.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn

from omniq_compile.checkpoint_folder import read_config
from omniq_compile.foreign import OWN, refuse_foreign
from omniq_compile.layer_plan import plan_layers
from omniq_compile.loading import check_stored, fill_stored, set_dtypes
from omniq_compile.lowering.errors import CheckpointError, WeightError
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.lowering.target import detect, detectable
from omniq_compile.passes.config import QuantConfig
from omniq_compile.quantize_weights import quantize_, quantized_parameter
from omniq_compile.safetensors_files import SafetensorsFiles, release_free_memory
from omniq_compile.saving import make_savable, quantization_config

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
    if config.target is None and detectable(device.type):
        config = dataclasses.replace(config, target=detect(device.type))
    streaming: dict[str, Any] = {}
    errors: list[WeightError] = []
    if _has_conversions():
        streaming = {"quantization_config": _config_class()(config, errors)}
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
    except RuntimeError:
        if errors:  # transformers reports them as one of its own
            raise errors[0] from None
        raise
    model.requires_grad_(False)
    # What no file holds by its own name, such as a copy of another weight, is quantized now.
    quantize_(model.to(device), config)
    if any(isinstance(parameter, QuantizedTensor) for parameter in model.parameters()):
        make_savable(model, quantization_config(config))
    return model.eval()


def _load_stored(
    cls: Any, folder: Path, dtype: torch.dtype, device: torch.device, variant: str | None
) -> Any:
    about = cls.config_class.from_pretrained(folder)
    stored = dict(about.quantization_config)
    del about.quantization_config
    about.dtype = dtype
    with accelerate.init_empty_weights(include_buffers=False):
        model = cls(about)
    set_dtypes(model, dtype, _kept_in_float32(model, dtype))
    model.tie_weights()
    fill_stored(model, SafetensorsFiles(folder, variant), dtype, device, folder)
    model.tie_weights()
    model.requires_grad_(False)
    model = model.to(device).eval()
    make_savable(model, stored)
    return model


def _kept_in_float32(model: Any, dtype: torch.dtype) -> set[str]:
    """Return the modules that transformers' own loading keeps in float32 for a dtype."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        return kept | set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept if dtype is torch.bfloat16 else set()


def _has_conversions() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


@cache
def _config_class() -> Any:
    """Register omniq with transformers, which is imported here; returns its configuration class."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(OWN)
    class Config(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, config: QuantConfig, errors: list[WeightError]) -> None:
            self.quant_method = OWN
            self.config = config
            self.errors = errors

        def to_dict(self) -> dict[str, Any]:
            return quantization_config(self.config)

        @classmethod
        def from_dict(cls, *_: Any, **__: Any) -> Any:
            raise CheckpointError(
                "these weights were quantized by omniq, and transformers' from_pretrained does not "
                "load them. Use omniq_compile.from_pretrained(folder) on the pipeline's folder."
            )

    class Quantize(ConversionOps):  # type: ignore[misc]
        def __init__(self, config: Config) -> None:
            self.config = config

        def convert(
            self, input_dict: dict[str, Any], *_: Any, full_layer_name: str, **__: Any
        ) -> dict[str, Any]:
            (value,) = input_dict.values()
            weight = value[0] if isinstance(value, list) else value
            layer = full_layer_name.removesuffix(".weight")
            release_free_memory()
            try:
                return {full_layer_name: quantized_parameter(layer, weight, self.config.config)}
            except WeightError as error:
                self.config.errors.append(error)
                raise

    @register_quantizer(OWN)
    class Quantizer(HfQuantizer):  # type: ignore[misc]
        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
            config = self.quantization_config.config
            rows = plan_layers(model, config)
            self.planned = {f"{row.layer}.weight" for row in rows if row.method is not None}
            self.planned -= set(getattr(model, "all_tied_weights_keys", None) or {})

        def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
            return param_name in self.planned

        def get_quantize_ops(self) -> Any:
            return Quantize(self.quantization_config)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            self.remove_quantization_config(model)

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    return Config
