"""A graph as few nodes: products, what quantizes for them, attention, and what lies between.

What lies between becomes one node for each group of operations that read each other's results
and can be computed without waiting for a product in between. Inductor mostly fuses such a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from omniq_compile.passes import dynamo
from omniq_compile.passes.printing.node_words import describe, is_result, relative, weight_of
from omniq_compile.passes.rewrite import GEMM, QUANTIZE
from omniq_compile.passes.sites import Site

# Operations that only look at a tensor in another way: they are named where nothing else is done.
_VIEWS = {
    "getitem", "view", "reshape", "flatten", "unflatten", "chunk", "split", "unsqueeze", "squeeze",
    "expand", "transpose", "permute", "contiguous", "to", "type_as", "float", "getattr", "unbind",
    "view_as", "view_as_real", "view_as_complex", "clone",
}  # fmt: skip


@dataclass(frozen=True)
class FlowNode:
    """One node.

    Attributes:
        kind: low (a GEMM in low precision), kept (one in its own), quantize, attention, other,
            input or output.
        title: the layers.
        lines: what it does, and the dtype and shape of what it gives.
    """

    kind: str
    title: str
    lines: list[str]


@dataclass(frozen=True)
class Flow:
    """Nodes, and the pairs of their places between which values go. There are no cycles."""

    nodes: list[FlowNode]
    edges: list[tuple[int, int]]


def flow_of(gm: fx.GraphModule, names: dict[fx.Node, str], inside: str = "") -> Flow:
    """Summarise a traced or quantized graph; weights are left out.

    Args:
        names: of the inputs.
        inside: the block whose layers are named as it sees them.
    """
    groups = _absorbed(_groups(gm))
    place = {node: index for index, group in enumerate(groups) for node in group}
    nodes = [_node(group, names, inside) for group in groups]
    edges = {
        (place[read], place[node]): None
        for node in place
        for read in node.all_input_nodes
        if read in place and place[read] != place[node]
    }
    for result in dict.fromkeys(gm.graph.output_node().all_input_nodes):
        if result in place:
            edges[place[result], len(nodes)] = None
            nodes.append(FlowNode("output", names[result], [describe(dynamo.value(result))]))
    return Flow(nodes, list(edges))


def _kind(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.target is QUANTIZE:
        return "quantize"
    if node.target is GEMM:
        return "low"
    if is_result(node) and "omniq_added" not in node.meta:
        # In a traced graph, one that will be quantized is still in its own precision.
        return "kept"
    return "attention" if "attention" in _operation(node) else "other"


def _operation(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return name.removesuffix(".default").removesuffix("_")


def _groups(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Group the nodes of a graph, in an order in which each reads only earlier ones.

    The level of a node counts the products (and quantize and attention nodes) on the longest way
    to it. Two nodes of one level have no product between them, so joining those that are
    connected makes no cycle.
    """
    level: dict[fx.Node, int] = {}
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in gm.graph.nodes:
        if node.op in ("output", "get_attr") or (
            node.op == "placeholder" and (weight_of(node) is not None or not node.users)
        ):
            continue
        reads = [read for read in node.all_input_nodes if read in level]
        single = _kind(node) != "other"
        level[node] = max((level[read] for read in reads), default=0) + 2 * single
        leader[node] = node
        for read in reads:
            if not single and _kind(read) == "other" and level[read] == level[node]:
                leader[find(read)] = find(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in level:
        groups.setdefault(find(node), []).append(node)
    return sorted(groups.values(), key=lambda group: level[group[0]])


def _absorbed(groups: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Draw what only one other group reads as a part of that group."""
    home = {node: index for index, group in enumerate(groups) for node in group}
    for index, group in reversed(list(enumerate(groups))):
        readers = {home.get(user) for node in group for user in node.users} - {index}
        if len(readers) != 1 or _kind(group[0]) != "other":
            continue
        reader = readers.pop()
        if reader is not None and _kind(groups[reader][0]) == "other":
            groups[reader] = group + groups[reader]
            home |= dict.fromkeys(group, reader)
            groups[index] = []
    return [group for group in groups if group]


def _node(group: list[fx.Node], names: dict[fx.Node, str], inside: str) -> FlowNode:
    kind, last = _kind(group[0]), group[-1]
    value = describe(dynamo.value(last))
    if kind == "input":
        return FlowNode(kind, names[last], [value])
    # One quantize node may serve several products.
    named = list(last.users) if kind == "quantize" else group
    layers = dict.fromkeys(relative(dynamo.module_name(node), inside) for node in named)
    title = _few([layer for layer in layers if layer], 2) or "the block itself"
    if kind in ("low", "kept"):
        site: Site = last.meta["omniq_site"]
        problem, kernel = site.problem, site.decision.kernel
        lines = [f"{problem.K} to {problem.N}" if problem else site.spelling]
        lines.append(f"{site.decision.method}: {kernel.name}" if kernel and kind == "low" else "")
        return FlowNode(kind, title, [*filter(None, lines), value])
    operations = [_operation(node) for node in group]
    done = dict.fromkeys(o for o in operations if o not in _VIEWS) or dict.fromkeys(operations)
    given = [n for n in group if any(user not in group for user in n.users)]
    values = dict.fromkeys(describe(dynamo.value(node)) for node in given)
    return FlowNode(kind, title, [_few(done, 5), _few(values, 2)])


def _few(words: Iterable[str], count: int) -> str:
    words = list(words)
    more = f", + {len(words) - count}" if len(words) > count else ""
    return ", ".join(words[:count]) + more
