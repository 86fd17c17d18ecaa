"""The real and the imaginary parts of complex numbers, cut and joined as these are.

Inductor generates no code for complex tensors: each slice or concatenation of a table of them is an
operator of its own, which the host calls, where those of real numbers are computed where they are
read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from omniq_compile.passes import dynamo
from omniq_compile.passes.metadata import add_call, call_fake, fill_values, looks_alike
from omniq_compile.passes.moves import MOVES_OF_PARTS
from omniq_compile.passes.writes import any_written, lies_in, written_memory

_VIEWS_OF_PAIRS = (torch.view_as_complex, torch.ops.aten.view_as_complex.default)

Parts = tuple[fx.Node, fx.Node]


def is_view_of_pairs(node: Any) -> bool:
    """Say whether a node views pairs of real numbers as complex ones."""
    is_call = isinstance(node, fx.Node) and node.target in _VIEWS_OF_PAIRS
    return is_call and len(node.args) == 1 and not node.kwargs


def is_plain(node: Any) -> bool:
    """Say whether a value is complex64, and its memory holds just that."""
    if not dynamo.is_tensor(node) or not _is_complex64(dynamo.value(node)):
        return False
    # In-place operations may have given what was viewed another shape since.
    return not is_view_of_pairs(node) or looks_alike(
        call_fake(torch.view_as_real, dynamo.value(node)), dynamo.value(node.args[0])
    )


def _is_complex64(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype is torch.complex64
        and not value.is_conj()
        and not value.is_neg()
    )


class ComplexParts:
    """Adds the parts of complex numbers to a graph, once for all that read them."""

    def __init__(self, graph: fx.Graph) -> None:
        """Take a graph that nothing was replaced in yet."""
        self._written = written_memory(graph)
        self._of: dict[fx.Node, Parts] = {}
        self._added: list[fx.Node] = []

    def of(self, numbers: fx.Node) -> Parts:
        """Return the real and the imaginary part of plain complex numbers, both of their shape.

        What only moves complex numbers moves their parts instead, where it stands; where the graph
        writes to any of them, the parts are those of what the numbers are here.
        """
        order = self._moved(numbers)
        # What is written may have another name than these, such as that of which they are views.
        if any_written(order) or any(lies_in(node, self._written) for node in order):
            return self._select(numbers)
        for node in order:
            is_move = _is_move(node)
            with node.graph.inserting_before(node if is_move else _behind(node)):
                self._of[node] = self._move(node) if is_move else self._select(node)
        return self._of[numbers]

    def _moved(self, numbers: fx.Node) -> list[fx.Node]:
        """Return what numbers are moved from, and they themselves, each behind what it is made of.

        What has its parts already is left out: nothing made of it is written to.
        """
        order: dict[fx.Node, None] = {}
        stack = [numbers] if numbers not in self._of else []
        while stack:
            inputs = stack[-1].all_input_nodes if _is_move(stack[-1]) else []
            missing = [n for n in inputs if _holds_complex(n) and not (n in order or n in self._of)]
            if missing:
                stack += missing
            else:
                order[stack.pop()] = None
        return list(order)

    def _move(self, node: fx.Node) -> Parts:
        def moved(part: int) -> fx.Node:
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda n: self._of[n][part] if n in self._of else n
            )
            new = node.graph.create_node(node.op, node.target, args, kwargs)
            new.meta.update(node.meta)
            fill_values(new)
            self._added.append(new)
            return new

        return moved(0), moved(1)

    def _select(self, numbers: fx.Node) -> Parts:
        def call(function: Any, *arguments: Any) -> fx.Node:
            self._added.append(add_call(numbers, function, *arguments))
            return self._added[-1]

        is_view = is_view_of_pairs(numbers)
        pairs = numbers.args[0] if is_view else call(torch.view_as_real, numbers)
        return call(torch.select, pairs, -1, 0), call(torch.select, pairs, -1, 1)

    def erase_unused(self, numbers: Iterable[fx.Node]) -> None:
        """Erase what nothing reads: parts, some complex numbers, and what these were moved from."""
        for node in (*reversed(self._added), *reversed(self._of | dict.fromkeys(numbers))):
            if not node.users and node.op != "placeholder":
                node.graph.erase_node(node)


def _behind(node: fx.Node) -> fx.Node:
    """Return the first node that may read another; inputs of a graph all come first."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following


def _is_move(node: fx.Node) -> bool:
    """Say whether a node moves or selects plain complex numbers on their device, and no more."""
    if node.op not in ("call_function", "call_method") or node.target not in MOVES_OF_PARTS:
        return False
    # `to` and `view` take dtypes, which would make other numbers of each part.
    if any(isinstance(argument, torch.dtype) for argument in tree_leaves((node.args, node.kwargs))):
        return False
    inputs = node.all_input_nodes
    numbers = [n for n in inputs if _holds_complex(n)]
    others = [n for n in inputs if dynamo.is_tensor(n) and n not in numbers]
    devices = {value.device for n in (node, *numbers) for value in tree_leaves(dynamo.value(n))}
    return (
        bool(numbers)
        and all(map(_is_complex64, tree_leaves([dynamo.value(n) for n in (node, *numbers)])))
        and (not others or node.target is operator.getitem)
        and len(devices) == 1
        # What is not moved itself is viewed as real numbers, which several at once cannot be.
        and all(is_plain(n) or _is_move(n) for n in numbers)
    )


def _holds_complex(node: fx.Node) -> bool:
    values = tree_leaves(dynamo.value(node))
    return any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)
