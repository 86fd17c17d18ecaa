"""A hook of a compiled model, which copies of the model leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class OwnHook:
    """A hook that is there for one model: what was compiled of it, its copies are without."""

    def __reduce__(self) -> Any:
        """Name what does nothing, for what is copied or pickled."""
        return _copied_hook, ()


def _no_hook(*arguments: Any) -> None:
    pass


def _copied_hook() -> Callable[..., None]:
    return _no_hook
