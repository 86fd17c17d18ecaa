"""Weight expressions: a weight that is a view, slice or concatenation of parameters.

Such a weight depends on nothing but parameters, so it is evaluated and quantized when a parameter
is new or has changed, instead of in every call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from omniq_compile.passes import dynamo

# A tensor method and its positional arguments, applied to an operand or to the result.
Step = tuple[str, tuple[Any, ...]]

# Of torch.ops.aten, which exported models are made of.
_MOVING_OPERATORS = (
    "_to_copy", "alias", "cat", "chunk", "clone", "contiguous", "detach", "expand", "flatten",
    "narrow", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze",
    "stack", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view",
)  # fmt: skip


def _overloads(name: str) -> list[Any]:
    packet = getattr(torch.ops.aten, name)
    return [getattr(packet, overload) for overload in packet.overloads()]


# Operations that only move or select elements, or cast them: cheap to repeat, and without effect
# on anything else, but where `writes.is_in_place` finds an ``out``.
MOVES: frozenset[Any] = frozenset(
    {
        "chunk", "clone", "contiguous", "detach", "flatten", "narrow", "permute", "reshape",
        "select", "split", "split_with_sizes", "squeeze", "swapaxes", "t", "to", "transpose",
        "unbind", "unflatten", "unsqueeze", "view", "expand", "bfloat16", "half", "float",
        "to_local",
        operator.getitem, getattr,
        torch.cat, torch.chunk, torch.clone, torch.concat, torch.flatten, torch.narrow,
        torch.permute, torch.reshape, torch.select, torch.split, torch.squeeze, torch.stack,
        torch.t, torch.transpose, torch.unbind, torch.unsqueeze,
        *(overload for name in _MOVING_OPERATORS for overload in _overloads(name)),
    }
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class WeightExpression:
    """A weight as a function of parameters.

    Attributes:
        leaves: the parameter nodes of the traced graph, in the order of the module's arguments.
        module: computes the weight from the parameters.
        key: text that is equal for equal expressions over equally many leaves.
    """

    leaves: tuple[fx.Node, ...]
    module: fx.GraphModule
    key: str

    @property
    def is_parameter(self) -> bool:
        """Whether the weight is a parameter as it stands."""
        return self.module is _of_one_leaf(())


def is_expression(node: Any) -> bool:
    """Say whether the node is computed from parameters by moves alone."""
    if not isinstance(node, fx.Node):
        return False
    # No recursion: a chain of moves may be longer than Python's stack.
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if dynamo.is_weight(current):
            continue
        inputs = current.all_input_nodes
        if current.op not in ("call_function", "call_method") or current.target not in MOVES:
            return False
        if not inputs:
            return False
        stack += [n for n in inputs if n not in seen]
        seen.update(inputs)
    return True


def build(node: fx.Node, steps: Iterable[Step]) -> WeightExpression:
    """Build the expression for a node for which `is_expression` holds, followed by ``steps``."""
    if dynamo.is_weight(node):
        module = _of_one_leaf(tuple(steps))
        return WeightExpression((node,), module, module.code.strip())
    order = topological(node)
    leaves = tuple(n for n in order if dynamo.is_weight(n))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {
        leaf: graph.placeholder(f"w{i}") for i, leaf in enumerate(leaves)
    }
    for current in order:
        if current not in copies:
            args, kwargs = fx.map_arg((current.args, current.kwargs), copies.__getitem__)
            copies[current] = graph.create_node(current.op, current.target, args, kwargs, "value")
    module = _finish(graph, copies[node], steps)
    return WeightExpression(leaves, module, module.code.strip())


@cache
def _of_one_leaf(steps: tuple[Step, ...]) -> fx.GraphModule:
    """The expression of nearly every layer; a model has hundreds, so the code is made once."""
    graph = fx.Graph()
    return _finish(graph, graph.placeholder("w0"), steps)


def _finish(graph: fx.Graph, result: fx.Node, steps: Iterable[Step]) -> fx.GraphModule:
    for name, arguments in steps:
        result = graph.call_method(name, (result, *arguments))
    graph.output(result)
    return fx.GraphModule(torch.nn.Module(), graph)


def evaluate(expression: WeightExpression, leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the weight ``[..., N, K]`` from its parameters, detached."""
    with torch.inference_mode(False), torch.no_grad():
        result: torch.Tensor = expression.module(*leaves)
        return result.detach()


def topological(node: fx.Node) -> list[fx.Node]:
    """Return what the expression is made of, each node after its arguments, the first one first."""
    order: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        current = stack[-1]
        inputs = [] if dynamo.is_weight(current) else current.all_input_nodes
        missing = [n for n in inputs if n not in order]
        if missing:
            stack += reversed(missing)
        else:
            order[stack.pop()] = None
    return list(order)
