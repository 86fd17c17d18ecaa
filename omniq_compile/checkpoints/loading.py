"""`load_model`: one component from safetensors, quantized while it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omniq_compile.checkpoints.checkpoint_folder import model_class, read_config
from omniq_compile.checkpoints.filling import Devices, fill_quantized, fill_stored, set_dtypes
from omniq_compile.checkpoints.foreign import refuse_foreign
from omniq_compile.checkpoints.hub_download import whole_component
from omniq_compile.checkpoints.load_arguments import check_device, check_dtype, check_model_keywords
from omniq_compile.checkpoints.recorded_options import check_stored, quantization_config
from omniq_compile.checkpoints.safetensors_files import SafetensorsFiles
from omniq_compile.checkpoints.saving import make_savable
from omniq_compile.checkpoints.without_values import parameters_without_values
from omniq_compile.lowering.errors import OptionError
from omniq_compile.passes.config import QuantConfig


def load_model(
    source: type | str | Path,
    folder: str | Path | None = None,
    *,
    options: Mapping[str, Any] | QuantConfig | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    torch_dtype: torch.dtype | None = None,
    **hub: Any,
) -> nn.Module:
    """Load one diffusers model and quantize it on the way: BF16 is never resident as a whole.

    Each tensor is read from its memory-mapped file, cast, quantized on the device and dropped. The
    result is that of ``from_pretrained`` followed by `quantize_`, bit for bit.

    Args:
        source: the model's class and then ``folder``, or the folder alone, whose config.json names
            the class.
        folder: with config.json and safetensors files; a pipeline's folder, whose component of
            the class is meant; or a hub id, of which that component alone is downloaded.
        options: see `QuantConfig`; None for a checkpoint that omniq quantized.
        subfolder: the component of a pipeline's folder.
        variant: of the files, such as ``"fp16"``.
        dtype: of what is not quantized, and of the weights before they are; None is bfloat16.
        device: to load on.
        torch_dtype: another name for ``dtype``, as in diffusers.
        hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` and
            ``proxies``, as ``huggingface_hub.snapshot_download`` takes them; without effect on a
            local folder.

    Raises:
        OptionError: unknown arguments or options, a class that does not fit, a dtype or device that
            is none, or options that the quantized checkpoint was not made with.
        CheckpointError: files that are missing, damaged, quantized by something else, or do not
            fit the model.
        WeightError: a weight holds NaN or Inf; the message names its layer.
    """
    check_model_keywords(hub, _KEYWORDS)
    config = None if options is None else QuantConfig.from_options(options)
    dtype = check_dtype(dtype, torch_dtype)
    device = check_device(device)
    cls = source if isinstance(source, type) else None
    if cls is None and folder is not None:
        raise OptionError(
            f"load_model takes one folder, and before it a class or nothing: {str(source)!r} is "
            f"no class, and {str(folder)!r} is a second folder."
        )
    where = folder if cls is not None else source
    if where is None:
        raise OptionError("load_model needs the folder to load from, after the class.")
    place = whole_component(str(where), hub, subfolder, cls, variant)
    about = read_config(place)
    cls = model_class(about, cls, place)
    files = SafetensorsFiles(place, variant)
    refuse_foreign(place, about, files)
    stored = about.pop("quantization_config", None)
    if config is None and stored is None:
        raise OptionError(
            f'{place} is not quantized: say how with options={{"method": "int8"}}, or load it with '
            f"{cls.__name__}.from_pretrained."
        )
    if stored is not None:
        check_stored(place, stored, options)
    model = empty_model(cls, about, dtype)
    record = fill(model, files, stored, config, dtype, {"": device})
    model.register_to_config(_name_or_path=str(place))
    if record is not None:
        make_savable(model, record)
    # Buffers that no file has, such as rotary tables, were computed on the CPU.
    loaded: nn.Module = model.to(device).eval()
    return loaded


# What `load_model` takes beside the arguments of a download.
_KEYWORDS = tuple(load_model.__kwdefaults__ or ())


def fill(
    model: nn.Module,
    files: SafetensorsFiles,
    stored: Mapping[str, Any] | None,
    config: QuantConfig | None,
    dtype: torch.dtype,
    devices: Devices,
) -> dict[str, Any] | None:
    """Fill a model on the meta device, whose parameters have the dtypes to load in.

    Args:
        model: of diffusers.
        files: of its weights.
        stored: what config.json says of weights that omniq quantized, or None for others.
        config: how to quantize others.
        dtype: for buffers whose dtype the model itself chose and which the file stores in a low
            precision.
        devices: to load on.

    Returns:
        What config.json is to say of the model; None where no layer was quantized.

    Raises:
        CheckpointError: the files are damaged or do not fit the model.
        WeightError: a weight holds NaN or Inf; the message names its layer.
    """
    if stored is not None:
        fill_stored(model, files, stored, dtype, devices)
        return dict(stored)
    assert config is not None
    quantized = fill_quantized(model, files, config, devices)
    return quantization_config(config) if quantized else None


def empty_model(cls: Any, about: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build a diffusers model with parameters on the meta device, of the dtypes it loads in.

    What is no parameter, such as rotary tables, is computed as always.
    """
    with parameters_without_values():
        model = cls.from_config(dict(about))
    set_dtypes(model, dtype, getattr(cls, "_keep_in_fp32_modules", None) or (), stored_buffers=True)
    return model
