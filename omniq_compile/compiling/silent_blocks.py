"""Warns where a model was compiled by its blocks and, once it ran, nothing of them was compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from omniq_compile.compiling.own_hooks import OwnHook

logger = logging.getLogger("omniq")

_waiting: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


def after_first_call(model: nn.Module, then: Callable[[], None]) -> None:
    """Call a function once, when the model has been called, in place of one that still waits.

    Args:
        model: whose calls by Dynamo and by `torch.export` count for nothing.
        then: what to call; it may not keep the model alive.
    """
    before = _waiting.pop(model, None)
    if before is not None:
        before.remove()
    hook = _AfterFirstCall(then)
    hook.handle = _waiting[model] = model.register_forward_hook(hook)


class _AfterFirstCall(OwnHook):
    """A hook of a model, which Dynamo traces like the model: as nothing."""

    handle: RemovableHandle

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.handle.remove()
        self._then()


def warn_not_called(model: str, count: int, first: str) -> None:
    """Log that a model called its blocks' methods or parts, past what the blocks became.

    Args:
        model: its class.
        count: of blocks.
        first: of them, by name.
    """
    logger.warning(
        "nothing in %s is compiled: a call of it called none of its %d blocks, of which the first "
        "is %r, but methods or parts of theirs. Compile it whole, in place of "
        'omniq_compile.compile: torch.compile(model, backend="omniq", options=...)',
        model,
        count,
        first,
    )


def warn_without_products(model: str, count: int, first: str, graphs: int) -> None:
    """Log that blocks ran, and that no graph of theirs holds a product.

    Args:
        model: its class.
        count: of blocks.
        first: of them, by name.
        graphs: how many were compiled.
    """
    what = "no graph of theirs holds a product" if graphs else "Dynamo made no graph of them"
    logger.warning(
        "nothing in %s is quantized: all of its %d blocks ran, of which the first is %r, and %s, "
        'so that their layers run as they are. TORCH_LOGS="dynamo,graph_breaks" shows why',
        model,
        count,
        first,
        what,
    )
