"""What each stage promises, as data, checked at its boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from omniq_compile.lowering.errors import OmniqError
from omniq_compile.passes.context import Context
from omniq_compile.passes.rewrite import GEMM, QUANTIZE

STAGES = ("traced", "quantized", "lowered")


@dataclass(frozen=True)
class Promise:
    """A rule on the graph at the end of a stage; ``broken`` returns the offending nodes."""

    stage: str
    text: str
    broken: Callable[[fx.GraphModule, Context], list[fx.Node]]


def _own_operators(gm: fx.GraphModule, context: Context) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target in (QUANTIZE, GEMM)]


def _sites_left(gm: fx.GraphModule, context: Context) -> list[fx.Node]:
    """A decided site that no longer leads to a GEMM of ours in the graph."""
    served = {id(n.meta["omniq_site"]) for n in gm.graph.nodes if n.target is GEMM}
    return [s.node for s in context.sites if s.decision.method and id(s) not in served]


def _quantize_unused(gm: fx.GraphModule, context: Context) -> list[fx.Node]:
    return [
        n
        for n in gm.graph.nodes
        if n.target is QUANTIZE and not any(user.target is GEMM for user in n.users)
    ]


PROMISES = (
    Promise("traced", "no omniq operators", _own_operators),
    Promise("quantized", "every decided site is one omniq.gemm", _sites_left),
    Promise("quantized", "every omniq.quantize feeds an omniq.gemm", _quantize_unused),
    Promise("lowered", "no omniq.quantize and no omniq.gemm is left", _own_operators),
)


def check(stage: str, gm: fx.GraphModule, context: Context) -> None:
    """Check a stage's promises and the graph's own consistency.

    Raises:
        OmniqError: a promise is broken, which is a fault of a pass, not of the user.
    """
    gm.graph.lint()
    for promise in PROMISES:
        if promise.stage == stage:
            broken = promise.broken(gm, context)
            if broken:
                nodes = ", ".join(n.name for n in broken[:5])
                raise OmniqError(
                    f"internal error: after stage {stage!r}, {promise.text} does not hold for: "
                    f"{nodes}. Please report this with the output of `omniq dump`."
                )
