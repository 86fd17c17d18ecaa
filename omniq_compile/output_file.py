"""The one file that a command writes its result to: checked before the work, written after it."""

from __future__ import annotations

import os
from pathlib import Path

from omniq_compile.checkpoints.whole_file import written_whole
from omniq_compile.lowering.errors import OmniqError


def check_writable(option: str, file: Path | None) -> None:
    """Find out before the work that its result cannot be written.

    Args:
        option: by which the file was named, such as ``--out``.
        file: None where the result is printed.

    Raises:
        OmniqError: it is a folder, its folder is missing, or either refuses to be written to.
    """
    if file is None:
        return
    if file.is_dir():
        raise _refused(option, file, "Is a directory")
    if not file.parent.exists():
        raise _refused(option, file, "No such file or directory")
    if not file.parent.is_dir():
        raise _refused(option, file, "Not a directory")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise _refused(option, file, "Permission denied")


def write(option: str, file: Path, text: str) -> None:
    """Write the result, whole or not at all.

    Raises:
        OmniqError: the system refuses.
    """
    try:
        with written_whole(file) as place:
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _refused(option, file, str(error.strerror)) from error


def _refused(option: str, file: Path, why: str) -> OmniqError:
    return OmniqError(f"{option}: cannot write '{file}': {why}.")


def numbered(out: Path, count: int) -> list[Path]:
    """Return names for ``count`` files: ``out``, or where there are several ``out_0`` and so on."""
    if count == 1:
        return [out]
    return [out.with_stem(f"{out.stem}_{number}") for number in range(count)]
