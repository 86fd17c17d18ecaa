"""The folder that a command writes into: made and tried before hours of work go into it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from omniq_compile.lowering.errors import OptionError


def make_folder(folder: Path, *, empty: bool = False) -> Path:
    """Make a folder, and try that it can be written to.

    Args:
        folder: which may exist.
        empty: remove what is in it.

    Raises:
        OptionError: it cannot be made or written to.
    """
    try:
        if empty:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(f"--out {folder} cannot be written to: {error}.") from error
    return folder
