"""Values in JSON on a command line: ``--argument height=512``, of which each is said once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from omniq_compile.lowering.errors import OptionError


def read_json(text: str) -> Any:
    """Read JSON in which no object has a name twice.

    Raises:
        ValueError: it is none.
    """
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        again = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{again!r} is there twice")
    return content


def named_values(
    option: str, texts: Iterable[str], example: str, said: Mapping[str, str]
) -> dict[str, Any]:
    """Return the values of ``NAME=JSON``, by name.

    Args:
        option: that they are given by, such as ``--argument``.
        texts: what is given.
        example: of one, for who gives none.
        said: the options that already say a value, by its name.

    Raises:
        OptionError: one is not NAME=JSON, or is said twice.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in values:
            raise OptionError(f"{option} gives {name!r} twice.")
        if name in said:
            raise OptionError(f"{option} {text!r}: {said[name]} says {name!r} too. Give one.")
        try:
            values[name] = read_json(value)
        except ValueError as error:
            raise OptionError(
                f"{option} {text!r} is not NAME=JSON, such as {example}: {error}."
            ) from error
    return values
