"""Weight expressions: a weight that is a view, slice or concatenation of parameters.

Such a weight depends on nothing but parameters, so it is evaluated and quantized when a parameter
is new or has changed, instead of in every call.
"""

from __future__ import annotations

import inspect
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
# on anything else.
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

_IN_PLACE_NAMES = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
    "ilshift", "irshift", "setitem",
)  # fmt: skip
_IN_PLACE: frozenset[Any] = frozenset(getattr(operator, name) for name in _IN_PLACE_NAMES) | {
    f"__{name}__" for name in _IN_PLACE_NAMES
}


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


def is_in_place(node: fx.Node) -> bool:
    """Say whether the node may write to one of its arguments."""
    if node.op not in ("call_function", "call_method"):
        return False
    target = node.target
    if argument(node, "out") is not None or argument(node, "inplace"):
        return True
    if argument(node, "max_norm") is not None:
        return True  # an embedding, which scales the rows of its weight that it reads
    if isinstance(target, torch._ops.OpOverload):
        return _writes(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(_writes(getattr(target, name)) for name in target.overloads())
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True  # what its subgraph does is not looked into
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def argument(node: fx.Node, name: str) -> Any:
    """Return an argument of a Python function by its name, however it was passed."""
    if name in node.kwargs:
        return node.kwargs[name]
    if not inspect.isfunction(node.target):
        return None
    names = _positional_names(node.target)
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else None


@cache
def _positional_names(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _writes(operator: torch._ops.OpOverload) -> bool:
    """Say whether the schema names an argument that is written; ``out`` is seen at the call."""
    return any(
        argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out
        for argument in operator._schema.arguments
    )


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


def changed_in_graph(node: fx.Node) -> bool:
    """Say whether the graph writes to memory that the expression reads."""
    return any_written(_topological(node))


def any_written(nodes: Iterable[fx.Node]) -> bool:
    """Say whether the graph writes to memory of any of these nodes, or of what is made of it."""
    stack = list(nodes)
    seen = set(stack)
    while stack:
        current = stack.pop()
        for user in current.users:
            if is_in_place(user):
                return True
            if user not in seen and (user.target in MOVES or _storages(user) & _storages(current)):
                seen.add(user)
                stack.append(user)
    return False


def _storages(node: fx.Node) -> set[int]:
    """Identify the memory of a node's tensors: Dynamo's fake views share that of their base.

    ``_cdata`` is private, checked on torch 2.11 to 2.13: fake memory has no address.
    """
    values = map(dynamo.unwrapped, torch.utils._pytree.tree_leaves(dynamo.value(node)))
    return {v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)}


def build(node: fx.Node, steps: Iterable[Step]) -> WeightExpression:
    """Build the expression for a node for which `is_expression` holds, followed by ``steps``."""
    if dynamo.is_weight(node):
        module = _of_one_leaf(tuple(steps))
        return WeightExpression((node,), module, module.code.strip())
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


def _topological(node: fx.Node) -> list[fx.Node]:
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
