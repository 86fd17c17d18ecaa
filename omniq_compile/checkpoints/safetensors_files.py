"""A folder's safetensors files, one tensor at a time, with nothing trusted that is not checked.

Each file is memory-mapped, and mapped anew after some megabytes have been read, so that pages that
were read do not stay resident. Nothing is ever unpickled.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from omniq_compile.lowering.errors import CheckpointError

# Bytes read before a file is mapped anew: small beside a model, large beside a header.
REMAP_BYTES = 32 << 20

# Bytes that the system is asked to fetch from the disk while those before them are worked on.
READ_AHEAD_BYTES = 256 << 20

# What files of weights are named by, omniq's own first: a folder that was written over may have the
# original beside it.
STEMS = ("omniq_model", "diffusion_pytorch_model", "model")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of a tensor; ``dtype`` is by safetensors' name, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class SafetensorsFiles:
    """The tensors of one component's folder, by name."""

    def __init__(
        self, folder: Path, variant: str | None = None, *, files: Sequence[Path] | None = None
    ) -> None:
        """Read the index, where there is one, and every file's header.

        Args:
            folder: that the files are in.
            variant: of the files to find.
            files: that were found already.

        Raises:
            CheckpointError: there is no safetensors file, or several that may be meant; a file is
                missing, truncated or damaged; an index names a file outside its folder, or a
                tensor that its file does not hold.
        """
        self.folder = folder
        index: dict[str, Path] = {}
        if files is None:
            files, index = _find(folder, variant)
        for file in files:
            if file.suffix in _PICKLES:
                _refuse_pickle(folder, file.name)
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            with _open(file) as opened:
                for key, value in (opened.metadata() or {}).items():
                    self.metadata.setdefault(key, value)
                for name in opened.offset_keys():
                    if name in self.tensors:
                        raise CheckpointError(
                            f"tensor {name!r} is in {self.tensors[name].file} and again in {file}."
                        )
                    about = opened.get_slice(name)
                    shape = tuple(about.get_shape())
                    self.tensors[name] = StoredTensor(file, about.get_dtype(), shape)
        for name, file in index.items():
            held = self.tensors.get(name)
            if held is None or held.file != file:
                raise CheckpointError(
                    f"the index of {folder} says {name!r} is in {file.name}, which does not hold "
                    "it. Download the checkpoint again."
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in {t.file for t in self.tensors.values()})

    def read(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors one at a time, in the order they are stored.

        A tensor is backed by the file and must not be held: copy what is to be kept.

        Raises:
            CheckpointError: a file is damaged.
        """
        for file in dict.fromkeys(t.file for t in self.tensors.values()):
            wanted = [name for name in names if self.tensors[name].file == file]
            ahead = _ReadAhead(file)
            while wanted:
                read = 0
                with _open(file) as opened:
                    # What is mapped stays resident until the file is mapped anew.
                    while wanted and read < REMAP_BYTES:
                        name = wanted.pop(0)
                        try:
                            tensor = opened.get_tensor(name)
                        except (SafetensorError, OSError, RuntimeError) as error:
                            raise CheckpointError(
                                f"tensor {name!r} of {file} cannot be read: {error}."
                            ) from error
                        if read and read + tensor.nbytes > REMAP_BYTES:
                            wanted.insert(0, name)
                            break
                        read += tensor.nbytes
                        ahead.advance(tensor.nbytes)
                        yield name, tensor
                        del tensor
                release_free_memory()


class _ReadAhead:
    """Has the system fetch what is read next, where it can be told to: not on macOS or Windows."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read = self._asked = 0
        self.advance(0)

    def advance(self, nbytes: int) -> None:
        """Note that ``nbytes`` more are being read."""
        self._read += nbytes
        if not hasattr(os, "posix_fadvise") or self._asked > self._read + READ_AHEAD_BYTES // 2:
            return
        stop = self._read + READ_AHEAD_BYTES
        with self._file.open("rb") as opened:
            os.posix_fadvise(
                opened.fileno(), self._asked, stop - self._asked, os.POSIX_FADV_WILLNEED
            )
        self._asked = stop


def release_free_memory() -> None:
    """Give what Python has freed back to the system, where the C library keeps it: glibc.

    Temporaries of quantizing leave holes between the parts that stay, a tenth of the model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: the checkpoint is incomplete.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}). Download or copy it again."
        ) from error


def _find(folder: Path, variant: str | None) -> tuple[list[Path], dict[str, Path]]:
    """Return the files to read, and where an index says that each tensor is."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Check the path.")
    middle = f".{variant}" if variant else ""
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index{middle}.json"
        if index.is_file():
            mapping = _read_index(index)
            return list(dict.fromkeys(mapping.values())), mapping
        single = folder / f"{stem}{middle}.safetensors"
        if single.is_file():
            return [single], {}
    found = sorted(file.name for file in folder.iterdir() if file.suffix == ".safetensors")
    if len(found) == 1 and variant is None:
        return [folder / found[0]], {}
    if (part := _part_without_index(folder)) is not None:
        raise CheckpointError(
            f"{folder} has {part}, and no index of such files, as in "
            "diffusion_pytorch_model.safetensors.index.json. Download or copy it again."
        )
    if found:
        raise CheckpointError(
            f"{folder} has no diffusion_pytorch_model{middle}.safetensors. It has "
            f"{', '.join(found)}: name one of them with variant=..., as in ...model.VARIANT..."
        )
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickled:
        _refuse_pickle(folder, pickled[0])
    raise CheckpointError(f"{folder} has no safetensors file.")


def _part_without_index(folder: Path) -> str | None:
    """Return a file that is a part of several, in a folder where none says which they are."""
    if any(folder.glob("*.safetensors.index*.json")):
        return None
    parts = folder.glob("*-[0-9]*-of-[0-9]*.safetensors")
    return min((file.name for file in parts), default=None)


def _refuse_pickle(folder: Path, name: str) -> NoReturn:
    raise CheckpointError(
        f"{folder} has its weights in {name}, which only pickle reads, and omniq never does. Load "
        "it with diffusers and save_pretrained(..., safe_serialization=True) it."
    )


def _read_index(index: Path) -> dict[str, Path]:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in mapping.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of safetensors files: {error!r}."
        ) from error
    for name, file in pairs:
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{index} says that {name!r} is in {file!r}, which is not a file of its folder."
            )
    return {name: index.parent / file for name, file in pairs}
