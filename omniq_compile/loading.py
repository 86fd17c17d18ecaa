"""Quantize while loading: one component from safetensors, one tensor at a time."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from omniq_compile.checkpoint_folder import model_class, read_config
from omniq_compile.foreign import refuse_foreign
from omniq_compile.hub_download import check_hub_arguments, whole_component
from omniq_compile.layer_plan import LayerPlan, describe, nothing_quantized, plan_layers
from omniq_compile.load_arguments import check_device, check_dtype
from omniq_compile.lowering.errors import CheckpointError, OptionError
from omniq_compile.lowering.target import detect, detectable
from omniq_compile.passes.config import QuantConfig
from omniq_compile.quantize_weights import quantized_parameter
from omniq_compile.safetensors_files import SafetensorsFiles
from omniq_compile.saving import difference, make_savable, quantization_config
from omniq_compile.state import VERSION, join_parts, read_metadata, stored_names
from omniq_compile.unmatched import warn_unmatched_in

logger = logging.getLogger("omniq")


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
    check_hub_arguments(hub)
    config = None if options is None else QuantConfig.from_options(options)
    dtype = check_dtype(dtype, torch_dtype)
    device = check_device(device)
    cls = source if isinstance(source, type) else None
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
    model = empty_model(cls, about, dtype)
    quantized = True
    if stored is not None:
        check_stored(place, stored, options)
        fill_stored(model, files, dtype, device, place)
    else:
        assert config is not None
        stored = quantization_config(config)
        quantized = _fill_quantized(model, files, config, device, place)
    model.register_to_config(_name_or_path=str(place))
    if quantized:
        make_savable(model, stored)
    loaded: nn.Module = model.eval()
    return loaded


def empty_model(cls: Any, about: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build a diffusers model with parameters on the meta device, of the dtypes it loads in.

    What is no parameter, such as rotary tables, is computed as always.
    """
    with accelerate.init_empty_weights(include_buffers=False):
        model = cls.from_config(dict(about))
    set_dtypes(model, dtype, getattr(cls, "_keep_in_fp32_modules", None) or ())
    return model


def set_dtypes(model: nn.Module, dtype: torch.dtype, kept: Iterable[str]) -> None:
    """Give each parameter, which has no value yet, the dtype it loads in.

    Args:
        model: any module.
        dtype: of the parameters.
        kept: dotted names of modules, or a run of their parts, that stay in float32.
    """
    kept = list(kept)
    for name, parameter in list(model.named_parameters()):
        chosen = torch.float32 if is_inside(name, kept) else dtype
        like = torch.empty_like(parameter, dtype=chosen)
        _assign(model, name, nn.Parameter(like, requires_grad=False))


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Say whether a dotted name lies in one of some modules, or is it.

    Args:
        name: of a parameter.
        modules: dotted names, or a run of their parts.
    """
    return any(f".{module}." in f".{name}." for module in modules)


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor


def _fill_quantized(
    model: Any, files: SafetensorsFiles, config: QuantConfig, device: torch.device, place: Path
) -> bool:
    """Fill a model and say whether any of it was quantized."""
    warn_unmatched_in(model, config)
    if config.target is None and detectable(device.type):
        config = dataclasses.replace(config, target=detect(device.type))
    rows = plan_layers(model, config)
    layers = {f"{row.layer}.weight": row for row in rows if row.method is not None}
    expected = _check_names(model, set(files.tensors), place)
    with _progress(files.nbytes) as advance:
        for name, tensor in files.read([n for n in files.tensors if n in expected]):
            _check_shape(name, tensor, expected[name], place)
            advance(name, tensor.nbytes)
            _assign(model, name, _loaded(name, tensor, expected[name], layers, config, device))
    if layers:
        logger.info("load_model: %s from %s", describe(rows, config.method), place)
    else:
        why = nothing_quantized(rows, type(model).__name__)
        logger.warning("load_model: %s (%s)", why, place)
    return bool(layers)


def _loaded(
    name: str,
    tensor: torch.Tensor,
    like: torch.Tensor,
    layers: Mapping[str, LayerPlan],
    config: QuantConfig,
    device: torch.device,
) -> torch.Tensor:
    """Return a tensor of the file as the model holds it: quantized, or copied and cast."""
    if name in layers:
        moved = tensor.to(device, like.dtype)
        return quantized_parameter(layers[name].layer, moved, config)
    return _copied(tensor, like, like.dtype, device)


def _copied(
    tensor: torch.Tensor, like: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    copied = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
    return nn.Parameter(copied, requires_grad=False) if isinstance(like, nn.Parameter) else copied


def _check_names(model: Any, names: set[str], place: Path) -> dict[str, torch.Tensor]:
    """Return what the model expects, by name, after checking that the files hold it and no more."""
    expected = dict(model.state_dict(keep_vars=True))
    held = {id(expected[name]) for name in names if name in expected}  # tied weights have one name
    missing = sorted(n for n in set(expected) - names if id(expected[n]) not in held)
    if missing:
        raise CheckpointError(
            f"{place} lacks {len(missing)} of the {len(expected)} tensors of "
            f"{type(model).__name__}: {_some(missing)}."
        )
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    unexpected = sorted(
        name
        for name in names - set(expected)
        if not any(re.search(pattern, name) for pattern in patterns)
    )
    if unexpected:
        raise CheckpointError(
            f"{place} holds {len(unexpected)} tensors that {type(model).__name__} has no place "
            f"for: {_some(unexpected)}. Is config.json that of this checkpoint?"
        )
    return expected


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _check_shape(name: str, tensor: torch.Tensor, like: torch.Tensor, place: Path) -> None:
    if tensor.shape != like.shape:
        raise CheckpointError(
            f"{name!r} of {place} is of shape {list(tensor.shape)}, and the model of its "
            f"config.json has {list(like.shape)} there."
        )


def check_stored(
    place: Path, stored: Mapping[str, Any], options: Mapping[str, Any] | QuantConfig | None
) -> None:
    """Check omniq's own checkpoint against what was asked for, where anything was.

    Raises:
        CheckpointError: it is of another version.
        OptionError: it was not made with these options.
    """
    if stored.get("version") != VERSION:
        raise CheckpointError(
            f"{place} was quantized in version {stored.get('version')!r} of omniq's format, and "
            f"this omniq reads version {VERSION}. Quantize the original checkpoint again."
        )
    differs = "" if options is None else difference(stored, options)
    if differs:
        raise OptionError(
            f"{place} is {differs}. Leave the options out, or load the original checkpoint."
        )


def fill_stored(
    model: Any,
    files: SafetensorsFiles,
    dtype: torch.dtype,
    device: torch.device,
    place: Path,
) -> None:
    """Fill a model on the meta device from a folder of omniq's own.

    Parameters, quantized or not, get the dtypes that they have on the meta device.

    Args:
        model: with parameters of the dtypes to load in.
        files: of the folder.
        dtype: of the buffers that are stored in a low precision.
        device: to load on.
        place: the folder, for messages.

    Raises:
        CheckpointError: the files are damaged or do not fit the model.
    """
    weights = read_metadata(files.metadata, str(place)) or {}
    owners = {part: name for name, about in weights.items() for part in stored_names(name, about)}
    names = {owners.get(name, name) for name in files.tensors}
    expected = _check_names(model, names, place)
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    left = {name: sum(o == name for o in owners.values()) for name in weights}
    with _progress(files.nbytes) as advance:
        for name, tensor in files.read(list(files.tensors)):
            advance(name, tensor.nbytes)
            owner = owners.get(name)
            if owner is None:
                if name in expected:
                    _check_shape(name, tensor, expected[name], place)
                    like = expected[name]
                    if isinstance(like, nn.Parameter):
                        kind = like.dtype
                    else:  # a buffer in float32, such as a rotary table, is so for its precision
                        kind = torch.float32 if tensor.dtype is torch.float32 else dtype
                    _assign(model, name, _copied(tensor, like, kind, device))
                continue
            parts = waiting.setdefault(owner, {})
            parts[name] = torch.empty_like(tensor, device=device).copy_(tensor)
            if len(parts) == left[owner]:
                joined = join_parts(owner, weights[owner], waiting.pop(owner))
                _check_shape(owner, joined, expected[owner], place)
                joined = joined.with_parts(joined.parts, expected[owner].dtype)
                _assign(model, owner, nn.Parameter(joined, requires_grad=False))
    if waiting:
        name, parts = next(iter(waiting.items()))
        join_parts(name, weights[name], parts)  # raises, naming the part that is missing


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Show bytes and layer names, on a terminal only."""
    console = Console(stderr=True)
    columns = (
        BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def advance(name: str, nbytes: int) -> None:
            bar.update(task, advance=nbytes, description=name)

        yield advance
