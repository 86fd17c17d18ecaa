"""Layer patterns: how ``ignored_layers`` names layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from omniq_compile.lowering.errors import nearest


def matches(pattern: str, layer: str) -> bool:
    """Say whether a pattern names a layer.

    A pattern matches when it equals the full dotted name or a run of its dotted parts: ``img_mlp``
    matches ``transformer_blocks.3.img_mlp.net.2``. ``*``, ``?`` and ``[ab]``, one of some
    letters, work inside a part. ``re:`` starts a regular expression, which has to match the full
    name.
    """
    if pattern == layer:
        return True  # whatever it is called
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], layer) is not None
    wanted, parts = pattern.split("."), layer.split(".")
    return any(
        all(
            part == want or fnmatchcase(part, want)
            for part, want in zip(parts[start:], wanted, strict=False)
        )
        for start in range(len(parts) - len(wanted) + 1)
    )


def first_match(patterns: Sequence[str], layer: str) -> str | None:
    """Return the first pattern that names the layer, or None."""
    return next((p for p in patterns if matches(p, layer)), None)


def unmatched(patterns: Sequence[str], layers: Sequence[str]) -> dict[str, list[str]]:
    """Return each pattern that names no layer, with the nearest layer names or parts."""
    names = set(layers)
    for layer in layers:
        parts = layer.split(".")
        names.update(parts)
        names.update(".".join(parts[-n:]) for n in range(2, len(parts)))
    spelled = sorted(n for n in names if not n.isdigit())
    return {
        # A regular expression has to match a full name.
        pattern: nearest(pattern[3:], layers) if pattern[:3] == "re:" else nearest(pattern, spelled)
        for pattern in patterns
        if not any(matches(pattern, layer) for layer in layers)
    }
