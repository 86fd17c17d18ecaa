"""Sizes that are symbols in a traced graph, as they were in the call that was traced."""

from __future__ import annotations

from typing import Any


def traced_size(size: Any) -> int | None:
    """Return what a size was in the call that was traced, which ties nothing to it; None where
    that call's values decide.

    Private, checked on torch 2.11 to 2.15.
    """
    traced: int | None = size if isinstance(size, int) else size.node.hint
    return traced
