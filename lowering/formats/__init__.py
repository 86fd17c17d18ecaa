"""The arithmetic of each method: one file a method, one row here."""

from __future__ import annotations

from omniq_compile.lowering.errors import OptionError, unknown
from omniq_compile.lowering.formats import int8
from omniq_compile.lowering.formats.format import Format

FORMATS: dict[str, Format] = {
    int8.FORMAT.name: int8.FORMAT,
}


def get_format(method: str) -> Format:
    """Return the format of a method.

    Raises:
        OptionError: no such method.
    """
    if method not in FORMATS:
        raise OptionError(unknown("method", method, FORMATS))
    return FORMATS[method]
