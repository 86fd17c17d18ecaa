"""omniq as a quantization backend of transformers: what its loading asks for.

Uses transformers' interface for quantizers (``HfQuantizer``, ``WeightConverter`` and
``ConversionOps``), checked on transformers 5.24; version 4 has another one, and is refused.
Imported while transformers is (see `registration`), so that a load imports the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from omniq_compile.checkpoints.fitting import check_files, refuse_missing
from omniq_compile.checkpoints.foreign import OWN, refuse_foreign
from omniq_compile.checkpoints.recorded_options import (
    Method,
    RecordedConfig,
    check_formats,
    check_stored,
)
from omniq_compile.checkpoints.safetensors_files import SafetensorsFiles
from omniq_compile.checkpoints.saving_checks import dequantize_weights
from omniq_compile.checkpoints.state import read_metadata
from omniq_compile.integrations.saving_transformers import WEIGHTS
from omniq_compile.lowering.errors import CheckpointError, OmniqError, OptionError
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.passes.config import QuantConfig


class TransformersConfig(RecordedConfig, QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of transformers' ``from_pretrained``: quantizes while loading.

    Args:
        method: how weights and activations are quantized.
        options: as for `DiffusersConfig`.

    Raises:
        OptionError: an unknown option or value, or one that shapes no weight.
    """

    quant_method = Method.OMNIQ


class OmniqHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads a model for transformers, and leads a quantized one back to plain weights."""

    def __init__(self, quantization_config: TransformersConfig, **kwargs: Any) -> None:
        """Take the configuration, and whether the weights are stored quantized."""
        super().__init__(quantization_config, **kwargs)
        self.stored: Mapping[str, Any] = {}
        self.error: OmniqError | None = None
        # How weights are quantized, which for others than stored ones `_plan` completes: the
        # configuration is the user's, and may be given to a load on another device next.
        self.options: QuantConfig | None = None
        self._planned: set[str] = set()
        self._on_one_device = True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Check what can be before anything is read; called again when all devices are known.

        Raises:
            CheckpointError: transformers is too old.
            OptionError: a part of the model is to lie on the disk.
        """
        needed = "update_attn_implementation" if self.pre_quantized else "get_quantize_ops"
        if not hasattr(HfQuantizer, needed):
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot load weights that omniq quantizes:"
                " that needs 5.24. Use omniq_compile.from_pretrained on the pipeline's folder."
            )
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise OptionError(
                "quantized weights cannot be offloaded to the disk, where transformers writes "
                "plain tensors only. Name a device for every part in device_map."
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Name omniq's own file, which transformers then reads instead of its own.

        This hook has nothing to do with attention; it is the first that transformers calls with
        the model's configuration.
        """
        if self.pre_quantized:
            config.transformers_weights = WEIGHTS
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        if isinstance(device_map, Mapping):
            self._on_one_device = len(set(device_map.values())) < 2
        if self.pre_quantized:
            paths = [Path(file) for file in checkpoint_files]
            files = SafetensorsFiles(paths[0].parent, files=paths)
            self.stored = _checked(model, files, self.quantization_config.about)
        else:
            _refuse_foreign(checkpoint_files or ())
            self._plan(model, device_map if isinstance(device_map, Mapping) else {"": "cpu"})

    def _plan(self, model: Any, devices: Mapping[str, Any]) -> None:
        from omniq_compile.checkpoints.filling import is_inside, with_target
        from omniq_compile.integrations.text_encoders import kept_in_float32
        from omniq_compile.layer_plan import plan_layers

        self.options = with_target(self.quantization_config.options, devices)
        rows = plan_layers(model, self.options)
        # Which stay in float32 is not yet to be seen of the model's parameters.
        kept = kept_in_float32(model, model.dtype)
        names = (f"{row.layer}.weight" for row in rows if row.method is not None)
        self._planned = {name for name in names if not is_inside(name, kept)}
        # What is a copy of another weight, by transformers' own rules, is quantized after it.
        self._planned -= set(getattr(model, "all_tied_weights_keys", None) or {})

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Say whether a weight is quantized, as it is read or as it is stored."""
        return param_name in self._planned or param_name in self.stored

    @property
    def quantized_element_size(self) -> float:
        """Bytes of one element of a quantized weight, by which ``device_map="auto"`` reckons."""
        form = get_format(self.quantization_config.about["format"])
        return form.nbytes(1024, 1024) / 1024**2

    def get_quantize_ops(self) -> Any:
        """Return what quantizes one weight."""
        from omniq_compile.integrations.transformers_conversions import Quantize

        return Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return how stored parts become weights again: under the names that the model has now."""
        if not self.pre_quantized:
            return weight_conversions
        from omniq_compile.integrations.transformers_conversions import joined

        return joined(self)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        from omniq_compile.checkpoints.saving import make_savable
        from omniq_compile.quantize_weights import quantize_

        self.remove_quantization_config(model)
        vars(model.config).pop("transformers_weights", None)
        if self.error is not None:
            raise self.error
        # accelerate makes parameters anew where a model lies on several devices, without the mark.
        if not self.pre_quantized and self._on_one_device:
            _check_loaded(model)
        model.requires_grad_(False)
        if self.options is not None:
            # What no file holds by its own name, such as a copy of another weight.
            quantize_(model, self.options)
        if any(isinstance(parameter, QuantizedTensor) for parameter in model.parameters()):
            make_savable(model, self.quantization_config.about)

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Return a model with plain weights, of ``dtype`` or those that they stand for."""
        dequantize_weights(model, dtype)
        for name in ("omniq_quantization", "save_pretrained", "get_memory_footprint"):
            vars(model).pop(name, None)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """Say that transformers' own ``save_pretrained`` cannot save it; omniq's is called."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether the quantized weights can be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether the model can be compiled."""
        return True


def _checked(model: Any, files: SafetensorsFiles, about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check a stored model before anything of it is loaded; returns what it says of its weights.

    Raises:
        CheckpointError: it is damaged, of another version, or does not fit.
    """
    others = sorted(p.name for p in files.folder.glob(WEIGHTS.replace(".", ".*.")))
    if others:
        raise CheckpointError(
            f"{files.folder} also holds {', '.join(others)}, and transformers' from_pretrained "
            "cannot tell omniq which variant was asked for. Use omniq_compile.from_pretrained."
        )
    check_stored(files.folder, about, None)
    weights = read_metadata(files.metadata, str(files.folder)) or {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    check_files(model, files, weights, tied)
    check_formats(files, weights, about)
    return weights


def _refuse_foreign(checkpoint_files: Iterable[str]) -> None:
    """Check full-precision weights before they are read: transformers casts any code to a weight.

    Raises:
        CheckpointError: a file is damaged, or holds weights that somebody else quantized.
    """
    paths = [Path(file) for file in checkpoint_files]
    if paths and all(path.suffix == ".safetensors" for path in paths):
        files = SafetensorsFiles(paths[0].parent, files=paths)
        refuse_foreign(files.folder, {}, files)


def _check_loaded(model: Any) -> None:
    """Check that each parameter was loaded: transformers gives others random values, with a report.

    Raises:
        CheckpointError: the files lack one that the model's class does not allow to be missing.
    """
    allowed = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    parameters = dict(model.named_parameters())
    missing = [
        name
        for name, parameter in parameters.items()
        if not getattr(parameter, "_is_hf_initialized", False)
        and not any(re.search(pattern, name) for pattern in allowed)
    ]
    refuse_missing(model, missing, len(parameters), model.name_or_path)


def _register() -> None:
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(OWN, TransformersConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(OWN, OmniqHfQuantizer)


_register()
