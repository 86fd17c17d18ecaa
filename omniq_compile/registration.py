"""Makes omniq known to diffusers and transformers, when their quantizers are imported.

Neither library is imported for it. Both keep their quantizers in a dict of a module; once that
module has run, the one here that puts omniq into it is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Whose import to wait for, and what to import then.
_REGISTERED_BY = {
    "diffusers.quantizers.auto": "omniq_compile.diffusers_quantizer",
    "transformers.quantizers.auto": "omniq_compile.transformers_quantizer",
}


def register_when_imported() -> None:
    """Register with each library as soon as its quantizers are imported, or now where they are."""
    for library in _REGISTERED_BY:
        if library in sys.modules:
            _register(library)
        else:
            sys.meta_path.insert(0, _Waiting(library))


def _register(library: str) -> None:
    try:
        import_module(_REGISTERED_BY[library])
    except (ImportError, AttributeError, TypeError) as error:  # of a version that differs
        import logging

        logging.getLogger("omniq").warning(
            "omniq could not register with %s, whose from_pretrained will not know it: %r",
            library.partition(".")[0],
            error,
        )


class _Waiting:
    """A finder that leaves finding to the others, and has omniq registered when a module ran."""

    def __init__(self, library: str) -> None:
        self._library = library

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return what the other finders find, where it is the module that is waited for."""
        if name != self._library:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(self._library)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
