"""Writes a file whole or not at all: what was there stays until the new one is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
