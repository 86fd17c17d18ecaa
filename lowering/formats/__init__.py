"""The number formats: one file a format, one row here."""

from __future__ import annotations

from omniq_compile.lowering.errors import OptionError, unknown
from omniq_compile.lowering.formats import int8
from omniq_compile.lowering.formats.format import Format

FORMATS: dict[str, Format] = {
    int8.FORMAT.name: int8.FORMAT,
}


def get_format(name: str) -> Format:
    """Return a format by its name.

    Raises:
        OptionError: no such format.
    """
    if name not in FORMATS:
        raise OptionError(unknown("format", name, FORMATS))
    return FORMATS[name]
