"""One call of a model through Dynamo, whose graphs go to a function instead of a compiler."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from omniq_compile.compiling.compiled_modules import original
from omniq_compile.compiling.own_backend import own_backend
from omniq_compile.compiling.own_errors import own_errors
from omniq_compile.compiling.whole_or_blocks import read_as_whole

Record = Callable[[fx.GraphModule, Sequence[Any]], Any]


def run_traced(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], record: Record
) -> None:
    """Call a model once; ``record`` gets each graph and its inputs, and returns what to run.

    Sizes are numbers in the graphs, whatever was traced before in this process.

    Raises:
        OmniqError: ``record`` raised it; Dynamo's own error around it is taken off.
    """
    module = original(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    # Dynamo counts recompilations per code object: a code object of its own keeps one report from
    # using up another's limit.
    fresh = types.FunctionType(
        call.__code__.replace(co_name="call"), globals(), "call", None, call.__closure__
    )
    with torch.no_grad(), read_as_whole(), own_errors():
        torch.compile(fresh, **own_backend(record), dynamic=False)(*args, **kwargs)
