"""Writes a folder whole or not at all: what was there stays until the new one is complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from omniq_compile.lowering.errors import CheckpointError

# The file that says what a folder is: a pipeline, or one model.
PIPELINE = "model_index.json"
MODEL = "config.json"


def check_place(folder: Path, kind: str, *, overwrite: bool = False) -> Path:
    """Check where a folder is to be made; returns its place, which a link leads to.

    Args:
        folder: to make.
        kind: PIPELINE or MODEL. Only a folder of the same kind is replaced, as whatever else lies
            in a folder goes with it.
        overwrite: replace a folder that exists.

    Raises:
        CheckpointError: the folder is there already, has no name, is a file or lies in one, or is
            not of the kind that would replace it.
    """
    if not folder.name:
        raise CheckpointError(
            f"{folder} has no name, which a new folder is made under. Give one, such as quantized."
        )
    # The link stays, and the new folder is made where it leads, on the disk that has room for it.
    if folder.is_symlink():
        folder = folder.resolve()
    if file := file_in_the_way(folder):
        raise CheckpointError(f"{file} is a file. Remove it, or choose another folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise CheckpointError(
            f"{folder} exists already. Choose another folder, or replace it with overwrite=True, "
            "--overwrite on the command line."
        )
    # A pipeline's folder may hold a config.json too.
    there = next((name for name in (PIPELINE, MODEL) if (folder / name).is_file()), None)
    if there != kind:
        words = {PIPELINE: "a whole pipeline", MODEL: "one model", None: "no model"}
        raise CheckpointError(
            f"{folder} holds {words[there]}, and all of it would be deleted to write "
            f"{words[kind]}. Choose another folder, or remove this one yourself."
        )
    return folder


def file_in_the_way(folder: Path) -> Path | None:
    """Return the file that stands where a folder, or one around it, is to be made, if any."""
    return next((place for place in (folder, *folder.parents) if place.is_file()), None)


def write_aside(
    folder: Path, write: Callable[[Path], None], kind: str, *, overwrite: bool = False
) -> None:
    """Make a folder by writing it beside its place and renaming it, so that it is never half there.

    A folder that an interrupted run left beside it is removed first. What is replaced is moved
    aside too, to ``.NAME.old.*``, and removed when the new folder is in its place: a run that is
    killed between the two leaves it there.

    Args:
        folder: to make.
        write: writes what it is to hold into the folder that it is given.
        kind: see `check_place`.
        overwrite: replace a folder that exists.

    Raises:
        CheckpointError: see `check_place`; or the folder is being written by another process, or
            cannot be written (a full disk).
    """
    folder = check_place(folder, kind, overwrite=overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(folder, folder.with_name(f".{folder.name}.partial.lock")):
            _write_aside(folder, write)
    except BaseException as error:
        if _is_a_failed_write(error):
            left = f"{folder} is as it was" if folder.exists() else "Nothing was left"
            raise CheckpointError(
                f"cannot write {folder}: {error}. {left}. Choose another folder."
            ) from error
        raise


@contextmanager
def only_writer(folder: Path, lock_file: Path) -> Iterator[None]:
    """Keep other processes from writing the same folder; the system ends it with the process.

    Some network file systems have no locks: nothing is kept from others there.

    Raises:
        CheckpointError: another process writes it.
        OSError: the file of the lock cannot be made, where filelock 4 says that it is locked.
    """
    lock_file.touch()
    lock = FileLock(lock_file)
    try:
        with suppress(NotImplementedError):
            lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"{folder} is being written by another process. Wait for it, or choose another folder."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            lock_file.unlink(missing_ok=True)
        lock.release()


def _write_aside(folder: Path, write: Callable[[Path], None]) -> None:
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        write(aside)
        if folder.exists():
            _replace(folder, aside)
        else:
            aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _replace(folder: Path, new: Path) -> None:
    """Put a finished folder in the place of another; where that stops, one of them is there."""
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    old = place / folder.name
    try:
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(place, ignore_errors=True)
    except BaseException:
        # An interruption may come before or after what it seems to come from: only what is there
        # tells how far it went.
        if not folder.exists():
            _put_back(old, folder)
        shutil.rmtree(place, ignore_errors=True)
        raise


def _put_back(old: Path, folder: Path) -> None:
    try:
        old.rename(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}: {error}. The old one is whole, in {old}: move it back."
        ) from error


def _is_a_failed_write(error: BaseException) -> bool:
    # safetensors reports a failed write in an error of its own, with the system's words in it.
    return isinstance(error, (OSError, SafetensorError))
