"""Sizes that are symbols in a traced graph, as they were in the call that was traced."""

from __future__ import annotations

from typing import Any


def traced_size(size: Any) -> int | None:
    """Return a size's hint, what it was in the call that was traced, without adding a guard; None
    for an unbacked symbol.

    Private, checked on torch 2.11 to 2.15.
    """
    traced: int | None = size if isinstance(size, int) else size.node.hint
    return traced
