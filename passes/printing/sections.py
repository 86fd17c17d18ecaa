"""Cuts a graph into its blocks and what stands between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import fx

from omniq_compile.passes import dynamo
from omniq_compile.passes.patterns import matches
from omniq_compile.passes.printing.node_words import about, describe, is_result, relative, weight_of
from omniq_compile.passes.regions import block_classes, block_of, outside_layers


@dataclass(frozen=True)
class Section:
    """A run of a graph's nodes: one block, or what stands between two.

    Attributes:
        block: its dotted name, such as ``transformer_blocks.3``; "" for what is in no block.
        kind: the block's class.
        nodes: in order.
        inputs: the nodes outside that it reads, in the order in which it first does.
        outputs: those of its nodes that are read outside.
    """

    block: str
    kind: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def weights(self) -> list[fx.Node]:
        """The inputs that are the block's own parameters, buffers and quantized parts."""
        return [node for node in self.inputs if self.owns(node)]

    @property
    def values(self) -> list[fx.Node]:
        """All other inputs."""
        return [node for node in self.inputs if not self.owns(node)]

    def owns(self, node: fx.Node) -> bool:
        """Say whether an input is a weight of this very block."""
        name = weight_of(node)
        return bool(self.block) and name is not None and name.startswith(f"{self.block}.")

    def same_program(self) -> tuple[Any, ...]:
        """Return what is equal for blocks whose program is the same up to names and their index."""
        place: dict[fx.Node, int] = {}
        key: list[Any] = []
        for node in self.values:
            place[node] = len(place)
            key.append(("value", describe(dynamo.value(node))))
        for node in self.weights:
            place[node] = len(place)
            key.append((relative(str(weight_of(node)), self.block), about(node)))
        for node in self.nodes:
            read = tuple(place[n] for n in node.all_input_nodes)
            layer = relative(dynamo.module_name(node), self.block)
            key.append((node.op, node.target, _constants(node), read, layer, about(node)))
            place[node] = len(place)
        return (self.kind, *key)

    def graph(
        self, outputs: Sequence[fx.Node] | None = None, *, to_compile: bool = False
    ) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
        """Return the section as a graph of its own, and its nodes by those of the whole.

        Its inputs are the values and then the weights, its result is a tuple.

        Args:
            outputs: its nodes that the result holds; those that are read outside by default.
            to_compile: graphs that an operation calls, such as the branches of ``torch.cond``, stay
                attributes, as no compiler takes them as inputs.
        """
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in [*self.values, *self.weights]:
            if to_compile and node.op == "get_attr" and not dynamo.is_tensor(node):
                copies[node] = graph.node_copy(node)
                continue
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
            # What another section computes is here an input like any other.
            for key in ("omniq_site", "omniq_added"):
                copies[node].meta.pop(key, None)
            dynamo.drop_place(copies[node])
            dynamo.copy_source(copies[node], node)
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = dict(node.meta)
        wanted = self.outputs if outputs is None else outputs
        graph.output(tuple(copies[node] for node in wanted))
        owner = self.nodes[0].graph.owning_module
        assert owner is not None
        return fx.GraphModule(owner, graph), copies


def _constants(node: fx.Node) -> str:
    """Word a node's arguments with each node in them by its place among those it reads."""
    places = {n: f"%{place}" for place, n in enumerate(node.all_input_nodes)}
    return repr(fx.map_arg((node.args, node.kwargs), places.__getitem__))


def split(gm: fx.GraphModule) -> list[Section]:
    """Cut a graph into sections, in order; together they hold every node but inputs and output.

    A block that the graph enters twice has no place of its own: it stays between the others.
    """
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    around = [dynamo.modules_around(node) for node in nodes]
    outer = outside_layers(around)
    # Without the layer itself, or numbered layers of a `Sequential` would pass for blocks.
    above = (chain[: len(whole) - 1] for chain, whole in zip(outer, around, strict=True))
    classes = block_classes(above)
    home = {node: block_of(chain, classes) for node, chain in zip(nodes, outer, strict=True)}
    runs = [(block, list(run)) for block, run in groupby(nodes, home.__getitem__)]
    entered = Counter(block for block, _ in runs)
    home = {n: b if b is not None and entered[b] == 1 else None for n, b in home.items()}
    return [_section(block, list(run)) for block, run in groupby(nodes, home.__getitem__)]


def _section(block: tuple[str, str] | None, nodes: list[fx.Node]) -> Section:
    inside = set(nodes)
    inputs = (i for node in nodes for i in node.all_input_nodes if i not in inside)
    outputs = (node for node in nodes if any(user not in inside for user in node.users))
    name, kind = block or ("", "")
    return Section(name, kind, tuple(nodes), tuple(dict.fromkeys(inputs)), tuple(outputs))


def restrict(gm: fx.GraphModule, pattern: str) -> fx.GraphModule:
    """Return a graph of the layers that a pattern names, and what feeds them.

    What feeds a layer reaches back to the nearest products, to the block's inputs, or to the
    model's. What is read beyond that becomes an input.
    """
    kept: set[fx.Node] = set()
    wanted: list[fx.Node] = []
    for section in split(gm):
        inside = set(section.nodes)
        named = [n for n in section.nodes if matches(pattern, dynamo.module_name(n))]
        wanted += named
        pending = list(named)
        while pending:
            node = pending.pop()
            if node in kept or node not in inside:
                continue
            kept.add(node)
            pending += [n for n in node.all_input_nodes if not is_result(n) or n in named]
    nodes = [node for node in gm.graph.nodes if node in kept]
    section = _section(None, nodes)
    ends = [n for n in nodes if not any(user in kept for user in n.users)]
    return section.graph(ends)[0]


def module_names(graphs: Iterable[fx.GraphModule]) -> list[str]:
    """Return the names of the modules that graphs have operations of, in order."""
    nodes = (n for gm in graphs for n in gm.graph.nodes if n.op != "placeholder")
    return [name for name in dict.fromkeys(map(dynamo.module_name, nodes)) if name]


def added_for(result: fx.Node) -> list[fx.Node]:
    """Return the nodes that stand for a GEMM site, in order, its result last.

    They are those that passes added, back to the first that the model itself had.
    """
    found: dict[fx.Node, None] = {}
    pending = [result]
    while pending:
        node = pending.pop()
        found[node] = None
        pending += [
            n
            for n in node.all_input_nodes
            if "omniq_added" in n.meta and not is_result(n) and n not in found
        ]
    order: Callable[[fx.Node], bool] = found.__contains__
    return [node for node in result.graph.nodes if order(node)]
