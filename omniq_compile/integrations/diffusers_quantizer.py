"""omniq as a quantization backend of diffusers: what its loading and saving ask for.

Uses diffusers' interface for quantizers (``DiffusersQuantizer`` and its hooks), checked on
diffusers 0.42.1. diffusers maps the files and would hand over one tensor after the other; instead
omniq fills the model from the same files as `load_model` does, with the same checks and as little
memory. Only the tensors of a single file, which diffusers converts, are taken as they are handed
over. Imported while diffusers is (see `registration`), so that a load imports the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from omniq_compile.checkpoints.foreign import OWN, refuse_foreign
from omniq_compile.checkpoints.recorded_options import Method, RecordedConfig, check_stored
from omniq_compile.checkpoints.safetensors_files import SafetensorsFiles
from omniq_compile.checkpoints.saving_checks import (
    dequantize_weights,
    refuse_adapters,
    refuse_fused,
)
from omniq_compile.checkpoints.state import flatten_state, part_owners, read_metadata
from omniq_compile.lowering.errors import CheckpointError, OptionError
from omniq_compile.lowering.formats import get_format
from omniq_compile.memory import footprint
from omniq_compile.own_method import OwnMethod

if TYPE_CHECKING:
    from omniq_compile.checkpoints.filling import Devices
    from omniq_compile.integrations.single_file import SingleFile


class DiffusersConfig(RecordedConfig, QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of diffusers' ``from_pretrained`` and ``from_single_file``.

    It quantizes while loading.

    Args:
        method: how weights and activations are quantized.
        options: those of `QuantConfig` that shape weights (``ignored_layers``, ``min_features``,
            ``mxfp4_scale_alg``, ``weight_block_size``, ``num_bf16_fallback_layers``), or decide
            which layers are quantized (``target``).

    Raises:
        OptionError: an unknown option or value, or one that shapes no weight.
    """

    quant_method = Method.OMNIQ


class OmniqQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Loads a model for diffusers, and tells it how a quantized one is saved."""

    # Read by diffusers: keep a model's ``_keep_in_fp32_modules`` in float32.
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DiffusersConfig, **kwargs: Any) -> None:
        """Take the configuration, and whether the weights are stored quantized."""
        super().__init__(quantization_config, **kwargs)
        self._dtype = torch.get_default_dtype()
        self._devices: Devices = {"": "cpu"}
        self._files: SafetensorsFiles | None = None
        self._single: SingleFile | None = None
        self._model: Any = None
        self._quantized: set[str] = set()
        self._record: Mapping[str, Any] | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Check what can be before weights are read; called again when all devices are known.

        Raises:
            CheckpointError: diffusers is too old.
            OptionError: a part of the model is to lie on the disk.
        """
        if not hasattr(DiffusersQuantizer, "maybe_update_state_dict"):
            raise CheckpointError(
                f"diffusers {diffusers.__version__} cannot load weights that omniq quantizes: that "
                "needs 0.39 or later. Use omniq_compile.load_model(folder)."
            )
        if not isinstance(device_map, Mapping):
            return
        if "disk" in device_map.values():
            raise OptionError(
                "quantized weights cannot be offloaded to the disk, where diffusers writes plain "
                "tensors only. Name a device for every part in device_map."
            )
        self._devices = device_map

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Note the dtype to load in; without one diffusers loads in torch's default."""
        self._dtype = torch_dtype or torch.get_default_dtype()
        return torch_dtype

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Note the files, and return what they hold with a weight in the place of its parts.

        Raises:
            CheckpointError: they are damaged, no safetensors files, of another version of omniq's
                format, or quantized by something else.
        """
        paths = [Path(file) for file in checkpoint_files]
        files = SafetensorsFiles(paths[0].parent, files=paths)
        if self.pre_quantized:
            check_stored(files.folder, self.quantization_config.about, None)
        else:
            refuse_foreign(files.folder, {}, files)
        self._files = files
        owners = part_owners(read_metadata(files.metadata, str(files.folder)) or {})
        return list(dict.fromkeys(owners.get(key, key) for key in loaded_keys))

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Return none: omniq raises for what is missing, and tied weights are stored once."""
        return []

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: Any = None, state_dict: Any = None, **kwargs: Any
    ) -> None:
        from omniq_compile.checkpoints.filling import set_dtypes
        from omniq_compile.integrations.single_file import SingleFile
        from omniq_compile.layer_plan import plan_layers

        set_dtypes(model, self._dtype, keep_in_fp32_modules or (), stored_buffers=True)
        if self._files is None:  # from_single_file, which then hands over one tensor after another
            self._single = SingleFile(model, state_dict, self.quantization_config.options)
            return
        self._model = model
        if self.pre_quantized:
            self._quantized = set(read_metadata(self._files.metadata) or {})
        else:
            rows = plan_layers(model, self.quantization_config.options)
            self._quantized = {f"{row.layer}.weight" for row in rows if row.method is not None}

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """Return a dtype as wide as a code, by which ``device_map="auto"`` reckons memory."""
        from accelerate.utils import CustomDtype

        form = get_format(self.quantization_config.about["format"])
        return CustomDtype.INT4 if form.nbytes(128, 128) < 128 * 128 else torch.int8

    def get_special_dtypes_update(
        self, model: Any, torch_dtype: torch.dtype
    ) -> dict[str, torch.dtype]:
        """Return the dtypes of what is not quantized, for the same."""
        return {
            name: parameter.dtype
            for name, parameter in model.named_parameters()
            if name not in self._quantized
        }

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Fill the model when diffusers has mapped its first file, and leave it nothing to do.

        Raises:
            CheckpointError: the files are damaged or do not fit the model, or a single file holds
                weights that omniq quantized.
            WeightError: a weight holds NaN or Inf; the message names its layer.
        """
        if self._files is None:  # from_single_file, which calls this before there is a model
            from omniq_compile.integrations.single_file import refuse_own

            refuse_own(state_dict)
            return state_dict
        if self._model is not None:
            from omniq_compile.checkpoints.loading import fill

            config = self.quantization_config
            stored = config.about if self.pre_quantized else None
            options = None if self.pre_quantized else config.options
            self._record = fill(
                self._model, self._files, stored, options, self._dtype, self._devices
            )
            self._model = None
        return {}

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: Any, **kwargs: Any
    ) -> bool:
        """Say that omniq puts every tensor of a single file in its place itself."""
        return self._single is not None

    def create_quantized_param(
        self, model: Any, param_value: Any, param_name: str, target_device: Any, state_dict: Any,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Put a tensor of a single file in its place, quantized where it is to be.

        Raises:
            WeightError: a weight holds NaN or Inf; the message names its layer.
        """
        assert self._single is not None
        # ``param_value`` was already cast to the dtype of the load, which may not be this
        # parameter's.
        self._single.put(param_name, state_dict[param_name], target_device)

    @property
    def supports_parallel_loading(self) -> bool:
        """Whether files may be loaded in several threads: the first one fills the model."""
        return False

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._single is not None:
            self._record = self._single.finish()
        self._files = self._single = None
        # Only casting reads these, which quantized weights of omniq's take part in.
        del model.is_quantized, model.quantization_method
        _forget(model)
        model.requires_grad_(False)
        if self._record is not None:
            attach_record(model, self._record)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, torch.Tensor], safe_serialization: bool = True
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the parts of every quantized weight as tensors of their own."""
        if not safe_serialization:
            raise CheckpointError("omniq saves to safetensors only: pickle is never used.")
        refuse_adapters(state_dict)
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

    @property
    def is_compileable(self) -> bool:
        """Whether the model can be compiled."""
        return True

    def _dequantize(self, model: Any) -> Any:
        dequantize_weights(model)
        for name in ("omniq_quantization", "save_config", "get_memory_footprint"):
            vars(model).pop(name, None)
        return model


def attach_record(model: Any, about: Mapping[str, Any]) -> None:
    """Let diffusers' own ``save_pretrained`` save a model that omniq quantized, and know its bytes.

    What is said of the weights is kept beside ``model.config``: a model made of that anew by
    ``from_config`` has plain weights.
    """
    model.hf_quantizer = OmniqQuantizer(DiffusersConfig.from_dict(about))
    model.omniq_quantization = dict(about)
    model.save_config = OwnMethod(_save_config, model)
    model.get_memory_footprint = OwnMethod(footprint, model)


def _save_config(model: Any, *args: Any, **kwargs: Any) -> None:
    # Before the first file is written, which would stay.
    refuse_adapters(name for name, _ in model.named_parameters())
    refuse_fused(model)
    config = model._internal_dict
    model.register_to_config(quantization_config=model.omniq_quantization)
    try:
        type(model).save_config(model, *args, **kwargs)
    finally:
        model._internal_dict = config


def _forget(model: Any) -> None:
    """Take the entry out of a model's configuration, for which diffusers has no function."""
    kept = {k: v for k, v in model.config.items() if k != "quantization_config"}
    model._internal_dict = FrozenDict(kept)


def _register() -> None:
    from diffusers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(OWN, DiffusersConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(OWN, OmniqQuantizer)


_register()
