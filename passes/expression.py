"""Weight expressions: a weight that is a view, slice or concatenation of parameters.

Such a weight depends on nothing but parameters, so it is evaluated and quantized when a parameter
is new or has changed, instead of in every call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from omniq_compile.passes import dynamo

# Operations that only move or select elements, or cast them: cheap to repeat, and without effect
# on anything else.
MOVES: frozenset[Any] = frozenset(
    {
        "chunk", "clone", "contiguous", "detach", "flatten", "narrow", "permute", "reshape",
        "select", "split", "squeeze", "swapaxes", "t", "to", "transpose", "unbind", "unflatten",
        "unsqueeze", "view", "expand", "bfloat16", "half", "float",
        operator.getitem, getattr,
        torch.cat, torch.chunk, torch.clone, torch.concat, torch.flatten, torch.narrow,
        torch.permute, torch.reshape, torch.select, torch.split, torch.squeeze, torch.stack,
        torch.t, torch.transpose, torch.unbind, torch.unsqueeze,
    }
)  # fmt: skip

_IN_PLACE_FUNCTIONS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior")
) | {operator.setitem}


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


def is_in_place(node: fx.Node) -> bool:
    """Say whether the node may write to one of its arguments."""
    if node.kwargs.get("out") is not None:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return node.target in _IN_PLACE_FUNCTIONS or (
            name.endswith("_") and not name.endswith("__")
        )
    return False


def is_expression(node: Any) -> bool:
    """Say whether the node is computed from parameters by moves alone."""
    if not isinstance(node, fx.Node):
        return False
    if dynamo.is_weight(node):
        return True
    if node.op not in ("call_function", "call_method") or node.target not in MOVES:
        return False
    inputs = node.all_input_nodes
    return bool(inputs) and all(is_expression(n) for n in inputs)


def changed_in_graph(node: fx.Node) -> bool:
    """Say whether the graph writes to memory that the expression reads."""
    seen: set[fx.Node] = set()
    stack = _topological(node)
    while stack:
        current = stack.pop()
        for user in current.users:
            if is_in_place(user):
                return True
            if user not in seen and user.target in MOVES:
                seen.add(user)
                stack.append(user)
    return False


def build(node: fx.Node, steps: Iterable[tuple[str, tuple[Any, ...]]]) -> WeightExpression:
    """Build the expression for a node for which `is_expression` holds, followed by ``steps``."""
    order = _topological(node)
    leaves = tuple(n for n in order if dynamo.is_weight(n))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {
        leaf: graph.placeholder(f"w{i}") for i, leaf in enumerate(leaves)
    }
    for current in order:
        if current not in copies:
            args, kwargs = fx.map_arg((current.args, current.kwargs), copies.__getitem__)
            copies[current] = graph.create_node(current.op, current.target, args, kwargs, "value")
    result = copies[node]
    for name, arguments in steps:
        result = graph.call_method(name, (result, *arguments))
    graph.output(result)
    module = fx.GraphModule(torch.nn.Module(), graph)
    return WeightExpression(leaves, module, module.code.strip())


def evaluate(expression: WeightExpression, leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the weight ``[..., N, K]`` from its parameters, detached."""
    with torch.inference_mode(False), torch.no_grad():
        result: torch.Tensor = expression.module(*leaves)
        return result.detach()


def _topological(node: fx.Node) -> list[fx.Node]:
    order: dict[fx.Node, None] = {}

    def visit(current: fx.Node) -> None:
        if current in order:
            return
        if not dynamo.is_weight(current):
            for argument in current.all_input_nodes:
                visit(argument)
        order[current] = None

    visit(node)
    return list(order)
