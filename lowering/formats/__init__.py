"""The number formats: one file a format, one row here."""

from __future__ import annotations

import re
from functools import cache

from omniq_compile.lowering.errors import OptionError, unknown
from omniq_compile.lowering.formats import fp8, int8, mxfp4, mxfp4_dualscale, mxfp8, unquantized
from omniq_compile.lowering.formats.format import Format

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        int8.FORMAT,
        fp8.FORMAT,
        mxfp8.FORMAT,
        mxfp4.FORMAT,
        mxfp4.UOS_FORMAT,
        mxfp4_dualscale.FORMAT,
        mxfp4_dualscale.UOS_FORMAT,
        unquantized.FORMAT,
    )
}

_BLOCK = re.compile(r"fp8_block_(\d+)x(\d+)")
_GROUP = re.compile(r"fp8_group_(\d+)")


def get_format(name: str) -> Format:
    """Return a format by its name: a row of `FORMATS`, ``fp8_block_RxC`` or ``fp8_group_C``.

    Raises:
        OptionError: no such format.
    """
    return FORMATS[name] if name in FORMATS else _by_size(name)


# Not `get_format` itself: Dynamo warns of each cached function that it traces, and each operation
# on a stored weight asks for its format.
@cache
def _by_size(name: str) -> Format:
    if match := _BLOCK.fullmatch(name):
        return fp8.block_format(int(match[1]), int(match[2]))
    if match := _GROUP.fullmatch(name):
        return fp8.group_format(int(match[1]))
    raise OptionError(unknown("format", name, (*FORMATS, "fp8_block_RxC", "fp8_group_C")))


def block_size(name: str) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale in ``fp8_block_RxC`` and ``fp8_group_C``."""
    if match := _BLOCK.fullmatch(name):
        return int(match[1]), int(match[2])
    if match := _GROUP.fullmatch(name):
        return 1, int(match[1])
    return None
