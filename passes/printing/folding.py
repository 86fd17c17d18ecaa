"""Shows repeated blocks once: one function for all blocks whose program is the same."""

from __future__ import annotations

import builtins
import keyword
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from torch import fx

from omniq_compile.passes import dynamo
from omniq_compile.passes.printing.node_words import (
    describe,
    identifier,
    readable_name,
    relative,
    weight_of,
)
from omniq_compile.passes.printing.program import LINES, Function, function
from omniq_compile.passes.printing.sections import Section, split

# What FX does not let a variable be called.
_TAKEN = {*keyword.kwlist, *dir(builtins), "inf", "nan", "NoneType", "torch", "device", "self"}
_TAKEN |= {"fx_pytree", "pytree", "weights"}


@dataclass
class Block:
    """The blocks of a model that run the same program.

    Attributes:
        function: the name of the function that the program is printed as.
        kind: the blocks' class.
        members: their dotted names, in the order in which they run.
        sections: the first of them at each stage.
        outputs: at each stage, the places in its nodes of what any of them gives to others.
    """

    function: str
    kind: str
    members: list[str] = field(default_factory=list)
    sections: dict[str, Section] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The members in few words, such as ``transformer_blocks.0 to transformer_blocks.59``."""
        return ranges(self.members)

    def graph(
        self, stage: str, *, to_compile: bool = False
    ) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
        """Return the program as a graph, and its nodes by those of the first member."""
        section = self.sections[stage]
        outputs = [section.nodes[i] for i in self.outputs[stage]]
        return section.graph(outputs, to_compile=to_compile)

    def print(self, stage: str) -> tuple[Function, dict[fx.Node, fx.Node]]:
        """Return the program as a function, and its nodes by those of the first member."""
        gm, copies = self.graph(stage)
        inside = self.sections[stage].block
        names = short_names(gm.graph.nodes, self.names, inside)
        return function(gm, self.function, names=names, inside=inside), copies


@dataclass
class FoldedGraph:
    """One traced graph at every stage: its sections, and each block's program."""

    stages: dict[str, fx.GraphModule]
    sections: dict[str, list[Section]]
    block_of: dict[str, Block]
    names: dict[str, str] = field(default_factory=dict)

    def blocks(self) -> list[Block]:
        """Return the distinct blocks in the order in which they first run."""
        return list({id(b): b for b in self.block_of.values()}.values())

    def print(self, stage: str) -> tuple[Function, dict[fx.Node, fx.Node]]:
        """Return what is in no block as a function that calls the blocks, and its nodes."""
        if not self.block_of:
            gm = self.stages[stage]
            return function(gm), {node: node for node in gm.graph.nodes}
        main = _Main(self, stage)
        return function(main.gm, names=short_names(main.gm.graph.nodes, self.names)), main.copies


def fold(graphs: Sequence[Mapping[str, fx.GraphModule]]) -> list[FoldedGraph]:
    """Find the blocks of graphs that are given at some stages, and those that are the same.

    Blocks are the same when their programs are at every stage, up to their index.
    """
    blocks: dict[Any, Block] = {}
    used: set[str] = {"forward"}
    folded = []
    for stages in graphs:
        sections = {stage: split(gm) for stage, gm in stages.items()}
        by_name: dict[str, dict[str, Section]] = {}
        for stage, found in sections.items():
            for section in found:
                if section.block:
                    by_name.setdefault(section.block, {})[stage] = section
        block_of = {}
        for name, at in by_name.items():
            key = tuple((stage, section.same_program()) for stage, section in at.items())
            if key not in blocks:
                kind = next(iter(at.values())).kind
                blocks[key] = Block(_unused(_snake_case(kind), used), kind, sections=at)
            block = block_of[name] = blocks[key]
            block.members.append(name)
            for stage, section in at.items():
                places = {node: place for place, node in enumerate(section.nodes)}
                given = {*block.outputs.get(stage, ()), *(places[n] for n in section.outputs)}
                block.outputs[stage] = sorted(given)
        folded.append(FoldedGraph(dict(stages), sections, block_of))
    return folded


def short_names(
    nodes: Iterable[fx.Node], known: dict[str, str], inside: str = ""
) -> dict[fx.Node, str]:
    """Name nodes as the model does, numbered anew from here on.

    FX numbers equal names through a whole graph; in the function of one block that number says
    nothing. A name that the model itself ends in a number loses it.

    Args:
        nodes: of one function.
        known: the names given to the same function at an earlier stage, which are kept; new ones
            are added.
        inside: the block whose weights are named as it sees them.
    """
    nodes = [node for node in nodes if node.op != "output"]
    used = {*_TAKEN, *known.values()}
    names: dict[fx.Node, str] = {}
    for node in nodes:
        key = str(node.meta.get("omniq_name", node.name))
        if key not in known:
            weight = weight_of(node)
            base = re.sub(r"_\d+$", "", readable_name(node))
            if weight is not None:
                base = identifier(relative(weight, inside))
            known[key] = _unused(base, used)
        names[node] = known[key]
    return names


def ranges(names: Sequence[str]) -> str:
    """Word numbered names in few words: ``blocks.0 to blocks.4, blocks.6``."""
    parts = [name.rpartition(".") for name in names]
    words = []
    for _, run in groupby(
        enumerate(parts),
        lambda item: (item[1][0], int(item[1][2]) - item[0] if item[1][2].isdigit() else -1),
    ):
        members = [".".join(p for p in (part[0], part[2]) if p) for _, part in run]
        words.append(members[0] if len(members) == 1 else f"{members[0]} to {members[-1]}")
    return ", ".join(words)


def _snake_case(kind: str) -> str:
    return identifier(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind)).lower() or "block"


def _unused(base: str, used: set[str]) -> str:
    name, number = base, 0
    while name in used:
        number += 1
        name = f"{base}_{number}"
    used.add(name)
    return name


def _block_call(*values: Any) -> Any:
    """Stands in the main graph for the blocks that are printed as functions."""


class _Main:
    """The graph of what is in no block, with one node for each run of the same blocks."""

    def __init__(self, folded: FoldedGraph, stage: str) -> None:
        self._folded, self._stage = folded, stage
        self._graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        whole = folded.stages[stage]
        sections = folded.sections[stage]
        self._numbers = _numbers(sections)
        read = {i for s in sections for i in (s.values if s.block else s.inputs)}
        output = whole.graph.output_node()
        for node in whole.graph.nodes:
            if node.op == "get_attr" or (
                node.op == "placeholder" and (node in read or output in node.users)
            ):
                self._copy(node)
        self._containers = {c: self._container(c) for c in self._numbers}
        for block, run in groupby(sections, lambda s: folded.block_of.get(s.block)):
            members = list(run)
            if block is None:
                for node in (n for section in members for n in section.nodes):
                    self._copy(node)
                continue
            for loop in self._loops(block, members):
                self._call(block, loop)
        self._graph.output(fx.map_arg(output.args[0], self.copies.__getitem__))
        self.gm = fx.GraphModule(whole, self._graph)

    def _copy(self, node: fx.Node) -> None:
        self.copies[node] = self._graph.node_copy(node, self.copies.__getitem__)
        self.copies[node].meta = dict(node.meta)
        dynamo.copy_source(self.copies[node], node)

    def _container(self, name: str) -> fx.Node:
        # The model itself may be the container, and a container's name may be a number.
        base = identifier(name)
        node = self._graph.placeholder(base if base.isidentifier() else f"blocks_{base}")
        node.meta["omniq_about"] = f"{len(self._numbers[name])} dicts of weights, by their names"
        return node

    def _loops(self, block: Block, members: list[Section]) -> list[list[Section]]:
        """Cut a run of equal blocks where they cannot be called in one loop."""
        loops = [members[:1]]
        for section in members[1:]:
            run = [*loops[-1], section]
            if self._carried(block, run) is None:
                loops.append([section])
            else:
                loops[-1] = run
        return loops

    def _outputs(self, block: Block, section: Section) -> list[fx.Node]:
        return [section.nodes[i] for i in block.outputs[self._stage]]

    def _carried(self, block: Block, run: list[Section]) -> dict[int, int] | None:
        """Return which input takes which output of the block before, or None if that changes."""
        carried: dict[int, int] = {}
        initial: dict[int, fx.Node] = {}
        for place, first in enumerate(run[0].values):
            given = [section.values[place] for section in run[1:]]
            if all(node is first for node in given):
                continue
            befores = [self._outputs(block, section) for section in run[:-1]]
            outputs = {
                before.index(node) if node in before else -1
                for before, node in zip(befores, given, strict=True)
            }
            output = outputs.pop()
            if outputs or output < 0 or initial.setdefault(output, first) is not first:
                return None
            carried[place] = output
        for section, following in pairwise(run):
            inside = {*section.nodes, *following.nodes}
            if any(user not in inside for node in section.outputs for user in node.users):
                return None
        return carried

    def _call(self, block: Block, run: list[Section]) -> None:
        """Write one node for a run of blocks, and one for each of its results."""
        values = [self.copies[node] for node in run[0].values]
        call = self._graph.call_function(_block_call, tuple(values))
        results = []
        for place, node in enumerate(self._outputs(block, run[-1])):
            result = self.copies[node] = self._graph.call_function(operator.getitem, (call, place))
            dynamo.set_value(result, dynamo.value(node))
            result.meta |= {
                "omniq_name": node.meta.get("omniq_name", node.name),
                LINES: lambda names: [],
            }
            results.append(result)
        carried = self._carried(block, run) or {}
        call.meta[LINES] = lambda names: self._lines(block, run, values, results, carried, names)

    def _lines(
        self,
        block: Block,
        run: list[Section],
        values: list[fx.Node],
        results: list[fx.Node],
        carried: Mapping[int, int],
        names: Mapping[fx.Node, str],
    ) -> list[str]:
        given = [
            names[results[carried[i]]] if i in carried else names[v] for i, v in enumerate(values)
        ]
        made = ", ".join(names[r] for r in results)
        left = f"{made} = " if len(results) > 1 else f"({made},) = " if results else ""
        about = ", ".join(describe(dynamo.value(r)) for r in results)
        container = names[self._containers[_container_of(run[0])]]
        numbers = [_number_of(section) for section in run]
        lines = [f"# {ranges([section.block for section in run])}"]

        def called(weights: str) -> str:
            arguments = ", ".join([*given, f"**{weights}"])
            return f"{left}{block.function}({arguments})  # {about}"

        if len(run) == 1:
            return [*lines, called(f"{container}[{numbers[0]}]")]
        if carried:
            first = {output: names[values[place]] for place, output in carried.items()}
            targets = ", ".join(names[results[output]] for output in first)
            lines.append(f"{targets} = {', '.join(first.values())}")
        consecutive = numbers == list(range(numbers[0], numbers[-1] + 1))
        which = f"{container}[{numbers[0]}:{numbers[-1] + 1}]"
        if not consecutive:
            which = f"[{container}[i] for i in {numbers}]"
        elif numbers == self._numbers[_container_of(run[0])]:
            which = container
        return [*lines, f"for weights in {which}:  # x {len(run)}", f"    {called('weights')}"]


def _container_of(section: Section) -> str:
    return section.block.rpartition(".")[0]


def _number_of(section: Section) -> int:
    return int(section.block.rpartition(".")[2])


def _numbers(sections: Iterable[Section]) -> dict[str, list[int]]:
    """Return the numbers of the blocks in each container, sorted."""
    found: dict[str, list[int]] = {}
    for section in sections:
        if section.block:
            found.setdefault(_container_of(section), []).append(_number_of(section))
    return {container: sorted(numbers) for container, numbers in found.items()}
