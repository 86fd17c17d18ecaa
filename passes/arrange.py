"""Decides which weights come as inputs in the layout that their kernel reads.

A swizzle of scales or a shuffle of codes depends on nothing but the weight: it is done when the
weight is quantized, and not in each call. A weight that is stored quantized stays as it is stored,
because a second copy of its codes would take the memory that was saved; small parts of it, such as
scales, are held twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from torch import fx

from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import as_stored
from omniq_compile.passes import dynamo
from omniq_compile.passes.context import Context
from omniq_compile.passes.metadata import call_fake
from omniq_compile.passes.printing.node_words import describe
from omniq_compile.passes.rewrite import GEMM

# The largest share of a stored weight's bytes that is held twice.
HELD_TWICE = 1 / 8


def arrange_weights(graph: fx.Graph, context: Context) -> set[fx.Node]:
    """Make inputs of arranged parts, and tell their bindings; returns those inputs."""
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    wanted: dict[str, set[Callable[[Parts], Parts]]] = {}
    for node in graph.nodes:
        if node.target is GEMM and not isinstance(node.args[1], fx.Node):
            kernel = node.meta["omniq_site"].decision.kernel
            wanted.setdefault(node.args[1][0].name, set()).add(kernel.arrange)
    arranged: set[fx.Node] = set()
    for position, binding in enumerate(context.bindings):
        arrange, *others = wanted.get(binding.parts[0], {as_stored})
        if others or arrange is as_stored:
            continue
        nodes = [inputs[name] for name in binding.parts]
        values: Parts = call_fake(arrange, [dynamo.value(node) for node in nodes])
        if binding.stored and not _small(values, nodes):
            continue
        for node, value in zip(nodes, values, strict=True):
            if value is not dynamo.value(node):
                dynamo.set_value(node, value)
                node.meta["omniq_about"] = f"{describe(value)}  as its kernel reads it"
        context.bindings[position] = dataclasses.replace(binding, arrange=arrange)
        arranged |= set(nodes)
    return arranged


def _small(values: Parts, nodes: Iterable[fx.Node]) -> bool:
    """Say whether what is held beside a stored weight is little of it."""
    stored = [dynamo.value(node) for node in nodes]
    new = [value for value, old in zip(values, stored, strict=True) if value is not old]
    return bool(sum(v.nbytes for v in new) <= HELD_TWICE * sum(old.nbytes for old in stored))
