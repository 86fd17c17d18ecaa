"""A method that one object has of its own, and that does not keep the object alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from omniq_compile.lowering.errors import OmniqError


class OwnMethod:
    """A function, called with its owner first, which has to be alive.

    A closure, a partial or a bound method in an object's own dict is a cycle: a model of many
    gigabytes would stay until Python collects garbage, and not go with its last name. And unlike
    a closure or a bound method, this comes back right from copying and pickling the owner.
    """

    def __init__(self, function: Callable[..., Any], owner: Any) -> None:
        """Take a function, picklable where its owner is with it, and its first argument."""
        self._function = function
        self._owner = weakref.ref(owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function.

        Raises:
            OmniqError: the owner is gone.
        """
        owner = self._owner()
        if owner is None:
            name = getattr(self._function, "__name__", "a method")
            raise OmniqError(
                f"{name.removeprefix('_')} is called on a model that is gone. "
                "Keep the model by a name while it is called; of a copy, by copy.deepcopy."
            )
        return self._function(owner, *args, **kwargs)

    def __reduce__(self) -> Any:
        """Name the owner, which copying and pickling replace by the new one."""
        return OwnMethod, (self._function, self._owner())
