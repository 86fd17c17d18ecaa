"""Checks that what is given as a model is one."""

from __future__ import annotations

from typing import Any

from torch import nn

from omniq_compile.lowering.errors import OptionError


def check_model(model: Any, function: str) -> None:
    """Check that a function is given a module, and not the pipeline around it.

    Raises:
        OptionError: it is something else; of a pipeline the message names the models in it.
    """
    if isinstance(model, nn.Module):
        return
    components = getattr(model, "components", None)
    models = [
        f"pipe.{name}"
        for name, component in (components.items() if isinstance(components, dict) else ())
        if isinstance(component, nn.Module)
    ]
    instead = f" Pass one of its models: {', '.join(models)}." if models else ""
    raise OptionError(
        f"omniq_compile.{function} takes a torch.nn.Module, not a {type(model).__name__}.{instead}"
    )
