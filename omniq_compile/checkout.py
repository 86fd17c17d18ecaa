"""Finds `passes` and `lowering` in a checkout, where they stand beside this package.

Python that is started in a checkout imports the package from there, whatever is installed: an
installed omniq, which `torch` imports, would break ``import torch`` by what is missing.
"""

from __future__ import annotations

import os
import sys
from importlib.util import spec_from_file_location
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

_PACKAGE = os.path.dirname(__file__)
_BESIDE = ("passes", "lowering")


def find_beside() -> None:
    """Have the two found beside this package, where they are not inside, as they are installed.

    Not by a second folder in ``__path__``: through that one the package would hold itself, and
    ``TORCH_LOGS=omniq_compile``, which looks through all that a package holds, would never end.
    """
    if not os.path.isdir(os.path.join(_PACKAGE, _BESIDE[0])):
        # Before the finder of an editable install, which may be of another checkout.
        sys.meta_path.insert(0, _Beside())


class _Beside:
    """A finder of the two, and of nothing else."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return where a package is that stands beside this one."""
        parent, _, last = name.rpartition(".")
        if parent != __package__ or last not in _BESIDE:
            return None
        folder = os.path.join(os.path.dirname(_PACKAGE), last)
        file = os.path.join(folder, "__init__.py")
        return spec_from_file_location(name, file, submodule_search_locations=[folder])
