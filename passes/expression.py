"""Weight expressions: a weight that is a view, slice or concatenation of parameters.

Such a weight depends on nothing but parameters, so it is evaluated and quantized when a parameter
is new or has changed, instead of in every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from omniq_compile.passes import dynamo, moves

# A tensor method and its positional arguments, applied to an operand or to the result.
Step = tuple[str, tuple[Any, ...]]


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
        inputs = moves.sources(current)
        if not inputs or not moves.is_move(current):
            return False
        stack += [n for n in inputs if n not in seen]
        seen.update(inputs)
    return True


def build(node: fx.Node, steps: Iterable[Step]) -> WeightExpression:
    """Build the expression for a node for which `is_expression` holds, followed by ``steps``."""
    # A weight that is cast to what it is stays the parameter, whatever it is stored as.
    node = moves.without_casts(node)
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
            op, target, args, kwargs = moves.spelled_out(current)
            args, kwargs = fx.map_arg((args, kwargs), copies.__getitem__)
            copies[current] = graph.create_node(op, target, args, kwargs, "value")
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
        inputs = [] if dynamo.is_weight(current) else moves.sources(current)
        missing = [n for n in inputs if n not in order]
        if missing:
            stack += reversed(missing)
        else:
            order[stack.pop()] = None
    return list(order)
