"""A registered backend of ``torch.compile`` that calls any function of omniq's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import fx
from torch._dynamo import register_backend

logger = logging.getLogger("omniq")

_NAME = "omniq_own"


def own_backend(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of ``torch.compile`` by which it calls a function for each graph.

    A function that is a backend itself would do the same, and keep models where they are: Dynamo
    refers weakly to each tensor that it traced. Once it is done it lets go of them where the
    backend is registered, and else keeps them while anything of the graph is kept. ``Module.to``
    swaps weights that are stored quantized, which PyTorch refuses while they are referred to.
    """
    return {"backend": _NAME, "options": {"function": function}}


def _own(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Callable[..., Any]],
    name: str | None = None,
) -> Any:
    if name is not None:
        logger.info("region %s", name)
    return options["function"](gm, inputs)


# A module that is loaded again, as in a notebook, finds its first one there, which does the same.
with suppress(AssertionError):
    register_backend(_own, name=_NAME, tags=("debug",))  # type: ignore[arg-type]
