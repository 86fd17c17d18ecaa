"""The folder that a command writes into, by one run at a time, and tried before hours of work."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omniq_compile.checkpoints.whole_file import is_of_no_room
from omniq_compile.checkpoints.written_folder import file_in_the_way, only_writer
from omniq_compile.lowering.errors import OptionError


def make_folder(folder: Path) -> Path:
    """Make a folder, which may exist, and try that it can be written to.

    Raises:
        OptionError: it cannot be made or written to.
    """
    if file := file_in_the_way(folder):
        raise OptionError(f"--out {folder}: {file} is a file. Choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(
            f"--out {folder} cannot be written to ({error.strerror}). Choose another folder."
        ) from error
    return folder


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder in ``out``, which is removed in the end.

    What a run that was killed left there goes. As long as it lasts, no other run writes to ``out``.

    Raises:
        CheckpointError: another one does.
        OptionError: the folder cannot be made or written to, or its disk has no room left.
    """
    work = out / ".work"
    with only_writer(out, out / ".work.lock"):
        try:
            shutil.rmtree(work, ignore_errors=True)
            yield make_folder(work)
        except Exception as error:
            if not is_of_no_room(error):
                raise
            raise OptionError(f"--out {out} cannot be written to: {error}.") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
