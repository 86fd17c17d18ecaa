"""Weight expressions: a weight that is a view, slice or concatenation of parameters, or computed
from parameters alone.

Such a weight is evaluated and quantized when a parameter is new or has changed, instead of in every
call.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from omniq_compile.lowering.tensor_of_parts import foreign_kind
from omniq_compile.passes import dynamo, moves
from omniq_compile.passes.weight_functions import WEIGHT_FUNCTIONS, is_number_of_numpy

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


def is_moved_weight(node: Any) -> bool:
    """Say whether the node is made of parameters by moves alone, without arithmetic.

    `is_of_parameters` says so of all that has a `WeightExpression`, arithmetic included.
    """
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


# Of a node that is computed from parameters alone, in ``meta``.
_COMPUTED = "omniq_of_parameters"


def find_computed(graph: fx.Graph, casting: Container[fx.Node]) -> None:
    """Note which nodes are computed from parameters alone, by moves and `WEIGHT_FUNCTIONS`.

    Args:
        graph: of Dynamo's, before it is changed.
        casting: its tensors that are computed under autocast, which none of these functions may be:
            a weight is evaluated outside of it.
    """
    for node in graph.nodes:
        inputs = [n for n in moves.sources(node) if not is_number_of_numpy(n)]
        alone = bool(inputs) and all(n.meta.get(_COMPUTED) or dynamo.is_weight(n) for n in inputs)
        if alone and (moves.is_move(node) or (_is_function(node) and node not in casting)):
            node.meta[_COMPUTED] = True


def _is_function(node: fx.Node) -> bool:
    """Say whether a node computes a plain tensor, by one of `WEIGHT_FUNCTIONS`."""
    is_call = node.op in ("call_function", "call_method")
    value = dynamo.value(node)
    return is_call and node.target in WEIGHT_FUNCTIONS and foreign_kind(value) is None


def is_of_parameters(node: Any) -> bool:
    """Say whether the node is computed from parameters alone: by moves, or as was noted of it."""
    return isinstance(node, fx.Node) and (
        dynamo.is_weight(node) or _COMPUTED in node.meta or is_moved_weight(node)
    )


def is_the_weight(one: fx.Node, other: fx.Node) -> bool:
    """Say whether the first of two factors is the weight, and the second is not.

    A parameter as it stands, or moved, comes before one that is computed from some: that may be
    what the model multiplies by its weights, such as learned tokens.
    """
    if is_moved_weight(one) != is_moved_weight(other):
        return is_moved_weight(one)
    return is_of_parameters(one) and not is_of_parameters(other)


def build(node: fx.Node, steps: Iterable[Step]) -> WeightExpression:
    """Build the expression for a node for which `is_of_parameters` holds, followed by ``steps``."""
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
    """Compute the weight ``[..., N, K]`` from its parameters, without gradients."""
    device = leaves[0].device.type
    # It may be on around the call, and off where the model computes the weight.
    can_cast = torch.amp.is_autocast_available(device)
    autocast = torch.autocast(device, enabled=False) if can_cast else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), autocast:
        result: torch.Tensor = expression.module(*leaves)
    return result


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
