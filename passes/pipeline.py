"""The ordered list of passes, and the runner that knows none of them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from omniq_compile.lowering.errors import OptionError, unknown
from omniq_compile.passes import dynamo, legal
from omniq_compile.passes.context import Context, PassRecord
from omniq_compile.passes.inference_mode import gradients_off
from omniq_compile.passes.inline import inline
from omniq_compile.passes.lower import lower
from omniq_compile.passes.match import find_sites
from omniq_compile.passes.names import name_as_in_model
from omniq_compile.passes.policy import decide, main_device
from omniq_compile.passes.real_rotary import real_rotary
from omniq_compile.passes.rewrite import rewrite
from omniq_compile.passes.shards import multiply_shards
from omniq_compile.passes.share import share
from omniq_compile.passes.sigmoid_gelu import sigmoid_gelu
from omniq_compile.passes.written_weights import written_weights

logger = logging.getLogger("omniq")


@dataclass(frozen=True)
class Pass:
    """A pass and where it stands.

    Attributes:
        name: by which it is logged and skipped.
        run: ``(gm, context) -> gm``. It may leave the code of ``gm`` behind its graph: the
            runner generates it once, at the end.
        ends: the stage that is complete after this pass, if any.
        optional: the graph is right without it.
    """

    name: str
    run: Callable[[fx.GraphModule, Context], fx.GraphModule]
    ends: str | None = None
    optional: bool = False


def _match(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    context.sites = find_sites(gm)
    return gm


def _decide(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    device = main_device(dynamo.devices(gm.graph))
    decide(context.sites, context.config, context.target, context.low_precision, device)
    return gm


PASSES = (
    Pass("inline", lambda gm, context: inline(gm)),
    Pass("names", lambda gm, context: name_as_in_model(gm, context.weight_names)),
    Pass("inference_mode", lambda gm, context: gradients_off(gm)),
    Pass("shards", lambda gm, context: multiply_shards(gm)),
    Pass("match", _match),
    Pass("policy", _decide, ends="traced"),
    Pass("written_weights", written_weights),
    Pass("rewrite", rewrite),
    Pass("share", share, ends="quantized", optional=True),
    Pass("real_rotary", real_rotary, optional=True),
    Pass("sigmoid_gelu", sigmoid_gelu, optional=True),
    Pass("lower", lower, ends="lowered"),
)


def run(
    gm: fx.GraphModule,
    context: Context,
    *,
    passes: Sequence[Pass] = PASSES,
    skip: Sequence[str] = (),
) -> fx.GraphModule:
    """Run the passes on a copy of the graph; the original is left as it was.

    Args:
        gm: the graph as Dynamo traced it.
        context: what to do, and what is found.
        passes: in order.
        skip: names of optional passes to leave out.

    Raises:
        OptionError: ``skip`` names no pass, or one that the result needs.
    """
    optional = [p.name for p in passes if p.optional]
    for name in skip:
        if name not in optional:
            raise OptionError(unknown("optional pass", name, optional))
    gm = dynamo.copy_graph(gm)
    for step in passes:
        if step.name not in skip:
            before, start = _operators(gm), time.perf_counter()
            gm = step.run(gm, context)
            after = _operators(gm)
            delta = {k: after[k] - before[k] for k in sorted(before | after)}
            record = PassRecord(
                step.name, time.perf_counter() - start, {k: d for k, d in delta.items() if d}
            )
            context.records.append(record)
            logger.debug("pass %s: %.3f s %s", record.name, record.seconds, record.delta)
        if step.ends:
            legal.check(step.ends, gm, context)
            if context.stages is not None:
                context.stages[step.ends] = dynamo.copy_graph(gm)
    gm.recompile()
    return gm


def _operators(gm: fx.GraphModule) -> Counter[str]:
    return Counter(
        getattr(n.target, "__name__", str(n.target))
        for n in gm.graph.nodes
        if n.op in ("call_function", "call_method")
    )
