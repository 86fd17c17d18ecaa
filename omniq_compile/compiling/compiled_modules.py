"""What PyTorch makes of a module that is compiled: a wrapper around it, or a call in its place.

Private, checked on torch 2.11 to 2.15: ``_orig_mod`` is the module in the wrapper that
``torch.compile`` returns, and ``_compiled_call_impl`` what ``nn.Module.compile`` sets, and what
``nn.Module.__call__`` runs in place of the module's own call. Copies of a module leave it behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def original(module: nn.Module) -> nn.Module:
    """Return what ``torch.compile`` wrapped, if it did."""
    wrapped = module._modules.get("_orig_mod")
    return module if wrapped is None else wrapped


def is_compiled(module: nn.Module) -> bool:
    """Say whether a module is such a wrapper, or compiled in place."""
    return original(module) is not module or module._compiled_call_impl is not None


def call_instead(module: nn.Module, call: Callable[..., Any]) -> None:
    """Let a call replace the module's own, as ``nn.Module.compile`` does."""
    module._compiled_call_impl = call  # type: ignore[assignment]
