"""A variant of a checkpoint, such as ``model.fp16.safetensors``: its names, and plain copies."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

WEIGHTS = (".safetensors", ".bin")
INDEX = ".index.json"


def is_of_weights(name: str) -> bool:
    """Say whether a file holds weights, or is an index of such files."""
    return name.endswith(WEIGHTS) or re.search(r"\.index(\.[^.]+)?\.json$", name) is not None


def mark_of(variant: str) -> re.Pattern[str]:
    """Return what is in the name of every file of a variant, and in no other's."""
    # diffusers: NAME.fp16.safetensors, NAME.fp16-00001-of-00002.safetensors or, older,
    # NAME-00001-of-00002.fp16.safetensors, and NAME.safetensors.index.fp16.json.
    return re.compile(rf"\.{re.escape(variant)}(?=[.-])")


def copy_as_plain(source: Path, folder: Path, variant: str) -> None:
    """Copy a component with the weights of one variant alone, by the names of no variant.

    Args:
        source: its folder, which has files of the variant.
        folder: to make.
        variant: such as ``"fp16"``.
    """
    mark = mark_of(variant)
    folder.mkdir()
    for entry in source.iterdir():
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name)
        elif not is_of_weights(entry.name):
            shutil.copy2(entry, folder / entry.name)
        elif mark.search(entry.name):
            place = folder / mark.sub("", entry.name)
            shutil.copy2(entry, place)
            if place.name.endswith(INDEX):
                place.write_text(mark.sub("", place.read_text("utf-8")), "utf-8")
