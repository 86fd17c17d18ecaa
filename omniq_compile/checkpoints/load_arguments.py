"""Checks what is said of a load before anything is read: keywords, dtype and device."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import diffusers
import torch

from omniq_compile.checkpoints.hub_download import HUB_ARGUMENTS
from omniq_compile.lowering.errors import OptionError, hint
from omniq_compile.passes.option_checks import CHECKS
from omniq_compile.passes.policy import DTYPES

# Diffusers 0.40 renamed the keyword, and warns of the old one.
_VERSION = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
DTYPE_KEYWORD = "dtype" if _VERSION >= (0, 40) else "torch_dtype"

_OWN_KEYWORDS = ("quantization", "dtype", "device", "variant")

# What ``DiffusionPipeline.from_pretrained`` takes of diffusers 0.36 to 0.42, beside the pipeline's
# own arguments: its signature has only ``**kwargs``.
_LOADER_KEYWORDS = (
    "cache_dir", "force_download", "proxies", "local_files_only", "token", "revision",
    "custom_pipeline", "custom_revision", "mirror", "provider", "sess_options",
    "provider_options", "device_map", "max_memory", "offload_folder", "offload_state_dict",
    "low_cpu_mem_usage", "use_safetensors", "use_onnx", "load_connected_pipeline",
    "quantization_config", "use_flashpack", "disable_mmap", "trust_remote_code",
    "output_loading_info",
)  # fmt: skip


def check_pipeline_keywords(pipeline: type, given: Iterable[str], index: Mapping[str, Any]) -> None:
    """Check the keywords that go on to a pipeline: diffusers ignores those it does not know.

    Args:
        pipeline: its class, or DiffusionPipeline for a pipeline that brings its own code: then
            the names in ``index`` count as its arguments.
        given: the keywords.
        index: the content of its model_index.json.

    Raises:
        OptionError: one that neither the pipeline nor diffusers' loading takes.
    """
    given = list(given)
    if "custom_pipeline" in given:  # another class, which diffusers finds
        return
    named = [
        name
        for name, parameter in inspect.signature(pipeline).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    own = sorted({*named, *(name for name in index if not name.startswith("_"))})
    for name in given:
        if name in own or name in _LOADER_KEYWORDS:
            continue
        if name == "options" or name in CHECKS:
            meant = " Did you mean 'quantization'?"
        else:
            meant = hint(name, [*_OWN_KEYWORDS, *own, *_LOADER_KEYWORDS])
        raise OptionError(
            f"from_pretrained takes no argument {name!r} for this pipeline.{meant} How to quantize "
            'is said by quantization, as in quantization={"method": "int8"}; the pipeline takes '
            f"{', '.join(own)}."
        )


def check_model_keywords(given: Iterable[str], own: Collection[str]) -> None:
    """Check the keywords of `load_model` that are none of its own, which are for downloading.

    Args:
        given: the keywords.
        own: those of the function itself, which one of them may have been meant for.

    Raises:
        OptionError: one is none of HUB_ARGUMENTS.
    """
    for name in given:
        if name in HUB_ARGUMENTS:
            continue
        if name == "quantization" or name in CHECKS:
            meant = " Did you mean 'options'?"
        else:
            meant = hint(name, [*own, *HUB_ARGUMENTS])
        raise OptionError(
            f"load_model takes no argument {name!r}.{meant} How to quantize is said by options, as "
            f'in options={{"method": "int8"}}; it takes {", ".join([*own, *HUB_ARGUMENTS])}.'
        )


def check_dtype(dtype: torch.dtype | None, torch_dtype: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype to load in, by its name or by the one that diffusers' users know.

    Raises:
        OptionError: it is none that layers compute in, or both are given and differ.
    """
    for name, value in (("dtype", dtype), ("torch_dtype", torch_dtype)):
        if value is None or value in DTYPES:
            continue
        named = getattr(torch, value, None) if isinstance(value, str) else None
        meant = f" Did you mean {named}?" if named in DTYPES else ""
        raise OptionError(
            f"{name} must be torch.bfloat16, torch.float16 or torch.float32, in which the layers "
            f"that are not quantized compute, and not {value!r}.{meant}"
        )
    if dtype is not None and torch_dtype is not None and dtype is not torch_dtype:
        raise OptionError(
            f"dtype is {dtype} and torch_dtype, another name for it, is {torch_dtype}. Give one."
        )
    return dtype or torch_dtype or torch.bfloat16


def check_device(device: str | torch.device) -> torch.device:
    """Return the device to load on.

    Raises:
        OptionError: PyTorch does not know it, or has none here.
    """
    try:
        return tried(device)
    except RuntimeError as error:
        meant = " Did you mean 'cuda'?" if device == "gpu" else ""
        raise OptionError(
            f"device {device!r} cannot be loaded on ({error}).{meant} Give one that this PyTorch "
            "has, such as 'cpu'."
        ) from error


def tried(device: str | torch.device) -> torch.device:
    """Return the device that a tensor was made on.

    Raises:
        RuntimeError: none could be made, in one line.
    """
    try:
        return torch.empty(0, device=device).device
    # What a build without the device, or a machine without one, raises is its own.
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise RuntimeError(str(error).partition("\n")[0] or type(error).__name__) from error
