"""Quantized weights in safetensors: plain tensors, and a line of metadata that says what they are.

A weight ``w`` becomes one tensor a part, ``w.codes`` and ``w.scale``; metadata under the key
``omniq`` is JSON: ``{"version": 1, "weights": {"w": {"method", "format", "shape", "dtype"}}}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from omniq_compile.lowering.errors import CheckpointError, OptionError
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.quantized_tensor import QuantizedTensor

KEY = "omniq"
VERSION = 1


def flatten_state(
    state: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a ``state_dict`` as plain tensors and metadata.

    Both are what ``safetensors.torch.save_file(tensors, path, metadata)`` takes.
    """
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, Any] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, QuantizedTensor):
            tensors[name] = tensor
            continue
        weights[name] = describe_weight(tensor)
        tensors |= part_names(name, tensor.format, tensor.parts)
    return tensors, metadata_of(weights)


def describe_weight(tensor: QuantizedTensor) -> dict[str, Any]:
    """Return what the metadata says of one weight."""
    return {
        "method": tensor.method,
        "format": tensor.format,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }


def metadata_of(weights: Mapping[str, Any]) -> dict[str, str]:
    """Return the safetensors metadata for weights as `describe_weight` describes them."""
    text = json.dumps({"version": VERSION, "weights": dict(weights)}, sort_keys=True)
    return {"format": "pt", KEY: text}


def part_names(name: str, format: str, parts: Any) -> dict[str, Any]:
    """Return parts by the names they are saved under."""
    names = get_format(format).parts
    return {f"{name}.{part}": tensor for part, tensor in zip(names, parts, strict=True)}


def stored_names(name: str, about: Any) -> list[str]:
    """Return the names that the parts of a described weight are saved under.

    Raises:
        CheckpointError: the description is damaged.
    """
    try:
        return [f"{name}.{part}" for part in get_format(about["format"]).parts]
    except (KeyError, TypeError, OptionError) as error:
        raise CheckpointError(f"the description of weight {name!r} is damaged: {error}.") from error


def read_metadata(metadata: Mapping[str, str] | None, where: str = "") -> dict[str, Any] | None:
    """Return the weights that metadata describes, or None where it is not omniq's.

    Args:
        metadata: as ``safe_open(...).metadata()`` returns it.
        where: the file, for messages.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    if not metadata or KEY not in metadata:
        return None
    place = f" of {where}" if where else ""
    try:
        content = json.loads(metadata[KEY])
        version, weights = content["version"], dict(content["weights"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"the omniq metadata{place} cannot be read: {error!r}.") from error
    if version != VERSION:
        raise CheckpointError(
            f"the quantized checkpoint{place} is of version {version}, and this omniq reads "
            f"version {VERSION}. Quantize the original checkpoint again."
        )
    return weights


def part_owners(weights: Mapping[str, Any]) -> dict[str, str]:
    """Return the weight that each stored part belongs to, by the part's name.

    Args:
        weights: as `read_metadata` returns them.

    Raises:
        CheckpointError: a description is damaged.
    """
    return {part: name for name, about in weights.items() for part in stored_names(name, about)}


def unflatten_state(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None
) -> dict[str, torch.Tensor]:
    """Undo `flatten_state`: return a ``state_dict`` with `QuantizedTensor`s, sharing memory.

    Raises:
        CheckpointError: metadata that is damaged, or parts that are missing or do not fit it.
    """
    weights = read_metadata(metadata) or {}
    left = dict(tensors)
    state = {name: join_parts(name, about, left) for name, about in weights.items()}
    return left | state


def join_parts(name: str, about: Any, tensors: dict[str, torch.Tensor]) -> QuantizedTensor:
    """Take one weight's parts out of ``tensors``, and check them against its description.

    Raises:
        CheckpointError: a part is missing or does not fit.
    """
    try:
        form, shape = get_format(about["format"]), torch.Size(about["shape"])
        dtype, method = getattr(torch, about["dtype"]), str(about["method"])
        expected = form.allocate(torch.empty(shape, dtype=dtype, device="meta"))
    except (KeyError, TypeError, AttributeError, RuntimeError, OptionError) as error:
        raise CheckpointError(f"the description of weight {name!r} is damaged: {error}.") from error
    parts = []
    for key, like in part_names(name, form.name, expected).items():
        part = tensors.pop(key, None)
        if part is None:
            raise CheckpointError(f"weight {name!r} lacks its part {key!r}.")
        if part.shape != like.shape or part.dtype != like.dtype:
            raise CheckpointError(
                f"{key!r} is {list(part.shape)} of {part.dtype}, and weight {name!r} of shape "
                f"{list(shape)} in {form.name} needs {list(like.shape)} of {like.dtype}."
            )
        parts.append(part)
    return QuantizedTensor(parts, form.name, method, shape, dtype)
