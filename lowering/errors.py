"""What omniq raises, and how it words the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OmniqError(Exception):
    """Base of every error omniq raises on purpose; the message says what to do."""


class OptionError(OmniqError, ValueError):
    """An option, method or target that omniq does not know, or a value out of range."""


class WeightError(OmniqError, ValueError):
    """A weight that cannot be quantized (NaN or Inf); the message names its layer."""


class CheckpointError(OmniqError, ValueError):
    """A checkpoint that is damaged, incomplete or of another kind; the message names the file."""


class GradientError(OmniqError, RuntimeError):
    """A call that asks for gradients; the rewritten graph has none."""


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` of ``valid``, the closest in spelling to ``name`` first."""
    return difflib.get_close_matches(name, list(valid), n=count, cutoff=0.4)


def hint(name: object, valid: Iterable[str]) -> str:
    """Ask whether the nearest of ``valid`` was meant, after a space; "" where none is near."""
    close = nearest(str(name), valid, 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(what: str, name: object, valid: Iterable[str]) -> str:
    """Word the error for an unknown ``name``: the nearest match, then all valid ones."""
    names = list(valid)
    return f"unknown {what} {name!r}.{hint(name, names)} Valid: {', '.join(names)}."
