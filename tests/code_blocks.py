"""The code that a page of Markdown shows between fences."""

from __future__ import annotations

import re
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(path: Path, language: str) -> list[str]:
    """Return the blocks of one language, in order."""
    return [code for kind, code in FENCE.findall(path.read_text("utf-8")) if kind == language]
