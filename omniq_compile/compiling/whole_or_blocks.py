"""Refuses a model that is compiled as a whole and by blocks, in whichever order that happens.

Where Dynamo traces a module it reads the code of its blocks, and not their compiled forms.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from omniq_compile.compiling.compiled_modules import is_compiled
from omniq_compile.compiling.own_hooks import OwnHook
from omniq_compile.lowering.errors import OptionError

_refusing: WeakSet[nn.Module] = WeakSet()
_readers = 0
_lock = threading.Lock()


def check_not_whole(model: nn.Module) -> None:
    """Refuse a model whose compiled form would leave out what its blocks become.

    Raises:
        OptionError: it is compiled as a whole.
    """
    if is_compiled(model):
        raise OptionError(
            f"this {type(model).__name__} is compiled as a whole already, which leaves out what "
            "omniq_compile.compile makes of its blocks. Pass the model itself, as it was before "
            "torch.compile or its own compile()."
        )


def refuse_whole(model: nn.Module) -> None:
    """Have a model refuse, when it is first called so, to be compiled as a whole after this."""
    if model not in _refusing:
        _refusing.add(model)
        model.register_forward_pre_hook(_WholeRefused(), prepend=True)


@contextmanager
def read_as_whole() -> Iterator[None]:
    """Let models be traced as a whole that are only to be read."""
    global _readers
    with _lock:
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1


class _WholeRefused(OwnHook):
    """A hook of a model, which Dynamo traces like the model; without Dynamo it does nothing."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_dynamo_compiling() and _readers == 0:
            _raise_refusal(type(module).__name__)


# An error that Dynamo met while tracing would make it give up on the frame, silently; what it does
# not trace, it calls. The reason is what it shows under fullgraph=True.
@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="omniq_compile.compile has compiled this model's blocks, which compiling it as a whole "
    "leaves out: compile it in one way only"
)
def _raise_refusal(kind: str) -> None:
    raise OptionError(
        f"this {kind} was compiled by omniq_compile.compile, block by block, and then as a whole, "
        "by torch.compile, its own compile() or something around it, which leaves out what its "
        "blocks became. Compile it in one way only: a copy.deepcopy of it is not compiled."
    )
