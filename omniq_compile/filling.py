"""Fills a model on the meta device from safetensors, one tensor at a time."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from omniq_compile.layer_plan import LayerPlan, describe, nothing_quantized, plan_layers
from omniq_compile.lowering.errors import CheckpointError, OptionError
from omniq_compile.lowering.target import detect, detectable
from omniq_compile.passes.config import QuantConfig
from omniq_compile.quantize_weights import quantized_parameter
from omniq_compile.safetensors_files import SafetensorsFiles
from omniq_compile.state import join_parts, part_owners, read_metadata
from omniq_compile.unmatched import warn_unmatched_in

logger = logging.getLogger("omniq")

# Which device each parameter goes to: by its name, or by a run of leading parts of it; "" is all.
Devices = Mapping[str, str | int | torch.device]


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


def device_of(name: str, devices: Devices) -> torch.device:
    """Return the device that a parameter goes to.

    Raises:
        OptionError: none is named for it.
    """
    place = name
    while place and place not in devices:
        place = place.rpartition(".")[0]
    if place not in devices:
        raise OptionError(f"device_map names no device for {name!r}. Add one for '', the rest.")
    return torch.device(devices[place])


def with_target(config: QuantConfig, devices: Devices) -> QuantConfig:
    """Return the options with the target that they are on, where they name none and it is known."""
    kinds = {torch.device(device).type for device in devices.values()}
    if config.target is None and len(kinds) == 1 and detectable(*kinds):
        return dataclasses.replace(config, target=detect(*kinds))
    return config


def fill_quantized(
    model: Any, files: SafetensorsFiles, config: QuantConfig, devices: Devices, place: Path
) -> bool:
    """Fill a model from full-precision weights, quantized on the way.

    Args:
        model: on the meta device, with parameters of the dtypes to load in.
        files: of the weights.
        config: how to quantize them.
        devices: to load on.
        place: the folder, for messages.

    Returns:
        Whether any layer was quantized.

    Raises:
        CheckpointError: the files are damaged or do not fit the model.
        WeightError: a weight holds NaN or Inf; the message names its layer.
    """
    warn_unmatched_in(model, config)
    config = with_target(config, devices)
    rows = plan_layers(model, config)
    layers = {f"{row.layer}.weight": row for row in rows if row.method is not None}
    expected = check_names(model, set(files.tensors), place)
    with _progress(files.nbytes) as advance:
        for name, tensor in files.read([n for n in files.tensors if n in expected]):
            check_shape(name, tensor, expected[name], place)
            advance(name, tensor.nbytes)
            device = device_of(name, devices)
            _assign(model, name, _loaded(name, tensor, expected[name], layers, config, device))
    if layers:
        logger.info("loading: %s from %s", describe(rows, config.method), place)
    else:
        why = nothing_quantized(rows, type(model).__name__)
        logger.warning("loading: %s (%s)", why, place)
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


def check_names(model: Any, names: set[str], place: Path) -> dict[str, torch.Tensor]:
    """Return what the model expects, by name, after checking that the files hold it and no more.

    Raises:
        CheckpointError: they do not.
    """
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


def check_shape(name: str, tensor: torch.Tensor, like: torch.Tensor, place: Path) -> None:
    """Check a stored tensor against the model's.

    Raises:
        CheckpointError: they differ in shape.
    """
    if tensor.shape != like.shape:
        raise CheckpointError(
            f"{name!r} of {place} is of shape {list(tensor.shape)}, and the model of its "
            f"config.json has {list(like.shape)} there."
        )


def check_files(
    model: Any, files: SafetensorsFiles, weights: Mapping[str, Any], tied: Collection[str] = ()
) -> None:
    """Check a folder of omniq's own against a model, from names, shapes and dtypes alone.

    Args:
        model: on the meta device.
        files: of the folder.
        weights: what their metadata says.
        tied: names of the model that no file needs to hold, as they are other ones' copies.

    Raises:
        CheckpointError: the files are damaged or do not fit the model.
    """
    owners = part_owners(weights)
    names = {owners.get(name, name) for name in files.tensors}
    expected = check_names(model, names | set(tied), files.folder)
    like = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in files.read(list(files.tensors))
    }
    like |= {name: join_parts(name, about, like) for name, about in weights.items()}
    for name in like.keys() & expected.keys():
        check_shape(name, like[name], expected[name], files.folder)


def fill_stored(
    model: Any,
    files: SafetensorsFiles,
    dtype: torch.dtype,
    devices: Devices,
    place: Path,
) -> None:
    """Fill a model on the meta device from a folder of omniq's own.

    Parameters, quantized or not, get the dtypes that they have on the meta device.

    Args:
        model: with parameters of the dtypes to load in.
        files: of the folder.
        dtype: of the buffers that are stored in a low precision.
        devices: to load on.
        place: the folder, for messages.

    Raises:
        CheckpointError: the files are damaged or do not fit the model.
    """
    weights = read_metadata(files.metadata, str(place)) or {}
    owners = part_owners(weights)
    names = {owners.get(name, name) for name in files.tensors}
    expected = check_names(model, names, place)
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    left = {name: sum(o == name for o in owners.values()) for name in weights}
    with _progress(files.nbytes) as advance:
        for name, tensor in files.read(list(files.tensors)):
            advance(name, tensor.nbytes)
            owner = owners.get(name)
            if owner is None:
                if name in expected:
                    check_shape(name, tensor, expected[name], place)
                    like = expected[name]
                    if isinstance(like, nn.Parameter):
                        kind = like.dtype
                    else:  # a buffer in float32, such as a rotary table, is so for its precision
                        kind = torch.float32 if tensor.dtype is torch.float32 else dtype
                    _assign(model, name, _copied(tensor, like, kind, device_of(name, devices)))
                continue
            parts = waiting.setdefault(owner, {})
            device = device_of(owner, devices)
            parts[name] = torch.empty_like(tensor, device=device).copy_(tensor)
            if len(parts) == left[owner]:
                joined = join_parts(owner, weights[owner], waiting.pop(owner))
                check_shape(owner, joined, expected[owner], place)
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
