"""Writes a file whole or not at all: what was there stays until the new one is complete."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_of_no_room(error: Exception) -> bool:
    """Say whether something could not be written because the disk, or a quota, is full."""
    # safetensors reports it in an error of its own, with the system's number in its words.
    words = (f"(os error {number})" for number in _NO_ROOM)
    return getattr(error, "errno", None) in _NO_ROOM or any(word in str(error) for word in words)


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Give a name to write to, whose file then takes the place of ``file``.

    A link stays one. What is no plain file, such as ``/dev/stdout``, and what lies in a folder
    that takes no new files, is written in place.

    Raises:
        OSError: the system refuses; ``file`` is as it was.
    """
    place = file.resolve()
    if (place.exists() and not place.is_file()) or not os.access(place.parent, os.W_OK):
        yield file
        return
    aside = place.with_name(f".{place.stem}.partial{place.suffix}")  # encoders go by the ending
    try:
        yield aside
        os.replace(aside, place)
    finally:
        aside.unlink(missing_ok=True)
