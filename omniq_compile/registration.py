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

# Where the dicts are, and what puts omniq into them.
_REGISTERED_BY = {
    "diffusers.quantizers.auto": "omniq_compile.integrations.diffusers_quantizer",
    "transformers.quantizers.auto": "omniq_compile.integrations.transformers_quantizer",
}
# What is imported after them, and before any model.
_LATER = {
    "diffusers.quantizers.auto": "diffusers.models.modeling_utils",
    "transformers.quantizers.auto": "transformers.modeling_utils",
}


def register_when_imported() -> None:
    """Register with each library as soon as its quantizers are imported, or now where they are."""
    for library in _REGISTERED_BY:
        module = sys.modules.get(library)
        if module is None:
            sys.meta_path.insert(0, _Waiting(library, library))
        elif hasattr(module, "AUTO_QUANTIZER_MAPPING"):
            _register(library)
        else:  # it is running, and the first to import torch, which imports omniq
            sys.meta_path.insert(0, _Waiting(_LATER[library], library))


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

    def __init__(self, awaited: str, library: str) -> None:
        self._awaited = awaited
        self._library = library

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return what the other finders find, where it is the module that is waited for."""
        if name != self._awaited:
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
