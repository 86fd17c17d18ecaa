"""A model that a function of the user's own makes: ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
import traceback
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from omniq_compile.lowering.errors import OmniqError, unknown


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, without gradients, and what to call it with."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    args: tuple[Any, ...] = field(default=())


def call_function(text: str) -> LoadedModel:
    """Call a user's function.

    Args:
        text: ``module:function``; modules are found as ``python -m`` finds them.

    Raises:
        OmniqError: there is no such function, it raised (with its own traceback), or what it
            returned is no model with inputs.
    """
    module_name, _, function_name = text.rpartition(":")
    # As `python -m` has it: the user's own files come first.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise OmniqError(_own_traceback(f"importing {module_name}", error)) from error
        here = [m.name for m in pkgutil.iter_modules([os.getcwd()])]
        raise OmniqError(unknown("module", module_name, here)) from error
    except Exception as error:
        raise OmniqError(_own_traceback(f"importing {module_name}", error)) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise OmniqError(unknown(f"function in module {module_name}", function_name, names))
    try:
        result = function()
    except Exception as error:
        raise OmniqError(_own_traceback(f"calling {text}", error)) from error
    match result:
        case (nn.Module() as model, dict() as inputs):
            return LoadedModel(text, model.eval().requires_grad_(False), inputs)
        case (nn.Module() as model, tuple() as args):
            return LoadedModel(text, model.eval().requires_grad_(False), {}, args)
    raise OmniqError(
        f"{text} must return (model, inputs): an nn.Module, and a dict of keyword arguments or a "
        f"tuple of arguments; it returned {_describe(result)}"
    )


def _describe(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


def _own_traceback(doing: str, error: Exception) -> str:
    # The first frame is this file's.
    first = error.__traceback__.tb_next if error.__traceback__ else None
    trace = "".join(traceback.format_exception(type(error), error, first)).rstrip()
    return f"{doing} raised {type(error).__name__}:\n{trace}"
