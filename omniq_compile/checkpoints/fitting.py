"""Checks a checkpoint's tensors against the model that they are for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from omniq_compile.checkpoints.safetensors_files import SafetensorsFiles
from omniq_compile.checkpoints.state import join_parts, part_owners
from omniq_compile.lowering.errors import CheckpointError


def check_names(model: Any, names: set[str], place: Path) -> dict[str, torch.Tensor]:
    """Return what the model expects, by name, after checking that the files hold it and no more.

    Raises:
        CheckpointError: they do not.
    """
    expected = check_complete(model, names, place)
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


def check_complete(
    model: Any, names: Collection[str], place: Path | str
) -> dict[str, torch.Tensor]:
    """Return what the model expects, by name, after checking that the files hold it.

    Raises:
        CheckpointError: they do not.
    """
    expected = dict(model.state_dict(keep_vars=True))
    held = {id(expected[name]) for name in names if name in expected}  # tied weights have one name
    missing = sorted(n for n in set(expected) - set(names) if id(expected[n]) not in held)
    refuse_missing(model, missing, len(expected), place)
    return expected


def refuse_missing(model: Any, missing: list[str], of: int, place: Path | str) -> None:
    """Raise where a model has tensors that no file holds.

    Raises:
        CheckpointError: it has.
    """
    if missing:
        raise CheckpointError(
            f"{place} lacks {len(missing)} of the {of} tensors of {type(model).__name__}: "
            f"{_some(missing)}."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def check_shape(name: str, tensor: torch.Tensor, like: torch.Tensor, place: Path | str) -> None:
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
