"""Builds models whose parameters have no values yet, in one thread and not in the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_thread = threading.local()
_registering = threading.Lock()


@contextmanager
def parameters_without_values() -> Iterator[None]:
    """Put the parameters of modules that are made inside on the meta device; buffers stay real.

    accelerate's ``init_empty_weights`` puts a function of its own in the place of one of
    ``nn.Module`` for that, in all threads: where two overlap, the one that ends last leaves it
    there, and no module of the process gets values any more.
    """
    with _registering:
        _hook_in()
    before = getattr(_thread, "without_values", False)
    _thread.without_values = True
    try:
        yield
    finally:
        _thread.without_values = before


@cache
def _hook_in() -> None:
    """Register once and for good: another thread may be going through the hooks at any time."""
    # Its documentation says that a hook may return a parameter; its annotation does not.
    register_module_parameter_registration_hook(_without_values)  # type: ignore[arg-type]


def _without_values(module: nn.Module, name: str, parameter: Any) -> nn.Parameter | None:
    if not getattr(_thread, "without_values", False):
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
