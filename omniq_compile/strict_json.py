"""JSON as the standard has it, which knows no infinite numbers and no NaN (RFC 8259, section 6)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(content: Any, indent: int) -> str:
    """Return JSON text, in which infinite and NaN are ``"Infinity"`` and ``"NaN"``.

    ``float()`` of Python and ``Number()`` of JavaScript read these words.
    """
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
