"""Fills a model on the meta device from safetensors, one tensor at a time."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from omniq_compile.checkpoints.fitting import check_names, check_shape
from omniq_compile.checkpoints.recorded_options import check_formats
from omniq_compile.checkpoints.safetensors_files import SafetensorsFiles
from omniq_compile.checkpoints.state import join_parts, part_owners, read_metadata
from omniq_compile.compiling.unmatched import warn_unmatched_in
from omniq_compile.layer_plan import describe, nothing_quantized, plan_layers
from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.target import detect, detectable
from omniq_compile.passes.config import QuantConfig
from omniq_compile.quantize_weights import quantized_parameter

logger = logging.getLogger("omniq")

# Which device each parameter goes to: by its name, or by the name of a module around it; "" is all.
Devices = Mapping[str, str | int | torch.device]


def set_dtypes(
    model: nn.Module, dtype: torch.dtype, kept: Iterable[str], *, stored_buffers: bool
) -> None:
    """Give each parameter, which has no value yet, the dtype it loads in.

    Args:
        model: any module.
        dtype: of the parameters.
        kept: modules that stay in float32: dotted names, or consecutive parts of such a name.
        stored_buffers: give the dtype to floating-point buffers that files hold too, as diffusers
            does; they have no value until it is read. transformers leaves them as the model makes
            them.
    """
    kept = list(kept)

    def chosen(name: str) -> torch.dtype:
        return torch.float32 if is_inside(name, kept) else dtype

    for name, parameter in list(model.named_parameters()):
        like = torch.empty_like(parameter, dtype=chosen(name))
        _assign(model, name, nn.Parameter(like, requires_grad=False))
    for name, tensor in model.state_dict(keep_vars=True).items() if stored_buffers else ():
        if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            _assign(model, name, torch.empty_like(tensor, dtype=chosen(name), device="meta"))


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Say whether a dotted name lies in one of some modules, or is it.

    Args:
        name: of a parameter.
        modules: dotted names, or consecutive parts of such a name.
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
    """Return the options with the target that they are on, where they name none and it is one."""
    places = set(map(torch.device, devices.values()))
    if config.target is None and all(map(detectable, places)):
        targets = set(map(detect, places))
        if len(targets) == 1:
            return dataclasses.replace(config, target=targets.pop())
    return config


class QuantizingFill:
    """Fills a model on the meta device tensor by tensor, each quantized as it comes."""

    def __init__(self, model: Any, config: QuantConfig, devices: Devices) -> None:
        """Plan what is quantized.

        Args:
            model: on the meta device, with parameters of the dtypes to load in.
            config: how to quantize them.
            devices: to load on.
        """
        warn_unmatched_in(model, config)
        self._model = model
        self._config = with_target(config, devices)
        self._devices = devices
        self._rows = plan_layers(model, self._config)
        self._layers = {f"{row.layer}.weight": row for row in self._rows if row.method is not None}

    def put(self, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
        """Take a tensor, quantized or copied and cast; it may be backed by a file.

        Args:
            name: of a parameter or buffer of the model.
            tensor: its value.
            like: what the model has there.

        Raises:
            OptionError: no device is named for it.
            WeightError: it holds NaN or Inf; the message names its layer.
        """
        device = device_of(name, self._devices)
        if name in self._layers:
            moved = tensor.to(device, like.dtype)
            loaded: torch.Tensor = quantized_parameter(
                self._layers[name].layer, moved, self._config
            )
        else:
            loaded = _copied(tensor, like, like.dtype, device)
        _assign(self._model, name, loaded)

    def report(self, place: Path | str) -> bool:
        """Log what was done of weights from ``place``; returns whether any was quantized."""
        if self._layers:
            line = describe(self._rows, self._config.method)
            logger.info("loading: %s from %s", line, place)
        else:
            why = nothing_quantized(self._rows, type(self._model).__name__, self._config)
            logger.warning("loading: %s (%s)", why, place)
        return bool(self._layers)


def fill_quantized(
    model: Any, files: SafetensorsFiles, config: QuantConfig, devices: Devices
) -> bool:
    """Fill a model from full-precision weights, quantized on the way.

    Args:
        model: on the meta device, with parameters of the dtypes to load in.
        files: of the weights.
        config: how to quantize them.
        devices: to load on.

    Returns:
        Whether any layer was quantized.

    Raises:
        CheckpointError: the files are damaged or do not fit the model.
        WeightError: a weight holds NaN or Inf; the message names its layer.
    """
    names = _names_now(model, files.tensors)
    filling = QuantizingFill(model, config, devices)
    expected = check_names(model, set(names.values()), files.folder)
    with _progress(files.nbytes) as advance:
        for stored, tensor in files.read([n for n, now in names.items() if now in expected]):
            name = names[stored]
            check_shape(name, tensor, expected[name], files.folder)
            advance(name, tensor.nbytes)
            filling.put(name, tensor, expected[name])
    return filling.report(files.folder)


def _names_now(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return what a model of diffusers calls the tensors of its files now, by their names there.

    The VAE of an old checkpoint has ``query`` for ``to_q``. diffusers lets a model rename the keys
    of a dict of its tensors, and leave out parts that they lack; here it is one of their names.
    """
    names = {name: name for name in stored}
    # Private, checked on diffusers 0.42.
    model._fix_state_dict_keys_on_load(names)
    return {name: now for now, name in names.items()}


def _copied(
    tensor: torch.Tensor, like: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    copied = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
    return nn.Parameter(copied, requires_grad=False) if isinstance(like, nn.Parameter) else copied


def fill_stored(
    model: Any,
    files: SafetensorsFiles,
    stored: Mapping[str, Any],
    dtype: torch.dtype,
    devices: Devices,
) -> None:
    """Fill a model on the meta device from a folder of omniq's own.

    Parameters, quantized or not, get the dtypes that they have on the meta device.

    Args:
        model: with parameters of the dtypes to load in.
        files: of the folder.
        stored: what config.json says of them.
        dtype: for buffers whose dtype the model itself chose and which the file stores in a low
            precision.
        devices: to load on.

    Raises:
        CheckpointError: the files are damaged or do not fit the model, or config.json.
    """
    place = files.folder
    weights = read_metadata(files.metadata, str(place)) or {}
    owners = part_owners(weights)
    check_formats(files, weights, stored)
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
                    kind = like.dtype
                    if not like.is_meta:  # a buffer whose dtype is its model's own
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
