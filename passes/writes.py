"""What a graph writes to: in-place operations, and the memory that they may change."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._ops import HigherOrderOperator

from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.passes import dynamo
from omniq_compile.passes.expression import topological
from omniq_compile.passes.moves import MOVES, sources
from omniq_compile.passes.weight_functions import is_number_of_numpy

_IN_PLACE_NAMES = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
    "ilshift", "irshift", "setitem",
)  # fmt: skip
_IN_PLACE: frozenset[Any] = frozenset(getattr(operator, name) for name in _IN_PLACE_NAMES) | {
    f"__{name}__" for name in _IN_PLACE_NAMES
}

# They give a tensor another shape, which Dynamo's fake tensor has from then on, and no other.
_SHAPE_NAMES = frozenset(
    (
        "as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_",
        "transpose_", "unsqueeze_",
    )
)  # fmt: skip

# Packages whose functions are called by the name of what they do, with "_" where that is to write.
_KNOWN = {"torch", "operator", "_operator", "builtins", "math", "omniq_compile"}


def is_in_place(node: fx.Node) -> bool:
    """Say whether the node may write to one of its arguments."""
    if node.op not in ("call_function", "call_method"):
        return False
    target = node.target
    if argument(node, "out") is not None or argument(node, "inplace"):
        return True
    if argument(node, "max_norm") is not None:
        return True  # an embedding, which scales the rows of its weight that it reads
    if _kept_statistics(node):
        return True
    if isinstance(target, torch._ops.OpOverload):
        return _writes(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(_writes(getattr(target, name)) for name in target.overloads())
    if isinstance(target, HigherOrderOperator):
        return True  # what its subgraph does is not looked into
    if not isinstance(target, str) and _is_foreign(target):
        return not is_number_of_numpy(node)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def reshaped_later(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that read or return a tensor whose shape the graph changes behind them.

    Of such a tensor a node's value has the last shape, and not that which it has at the node.
    """
    reshaped: set[int] = set()
    found = set()
    for node in reversed(graph.nodes):
        if any(id(dynamo.value(n)) in reshaped for n in (node, *node.all_input_nodes)):
            found.add(node)
        if _changes_shape(node):
            reshaped.add(id(dynamo.value(node.all_input_nodes[0])))
    return found


def _changes_shape(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.inplace_view in node.target.tags
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _SHAPE_NAMES


def _is_foreign(function: Any) -> bool:
    """Say whether nothing is known of a function: NumPy's, or a user's in `allow_in_graph`."""
    module = getattr(function, "__module__", None) or "torch"  # of its builtins it is None
    return module.partition(".")[0] not in _KNOWN or module.startswith("torch._dynamo.utils")


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


def changed_in_graph(node: fx.Node, shared: Mapping[fx.Node, list[fx.Node]]) -> bool:
    """Say whether the graph writes to memory that the expression reads.

    Args:
        node: one for which `is_of_parameters` holds.
        shared: what `inputs_in_one_memory` returns for its graph.
    """
    order = topological(node)
    return any_written([*order, *(other for n in order for other in shared.get(n, ()))])


def inputs_in_one_memory(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return the inputs of a graph that lie in the same memory as others, with these."""
    by_memory: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            for memory in set(_memory(node)):
                by_memory.setdefault(memory, []).append(node)
    together = [nodes for nodes in by_memory.values() if len(nodes) > 1]
    return {node: nodes for nodes in together for node in nodes}


def written_memory(graph: fx.Graph) -> frozenset[int]:
    """Identify the memory that a graph writes to, by whichever of its names; see `lies_in`."""
    written = (x for node in graph.nodes for x in node.all_input_nodes if _writes_to(node, x))
    return frozenset(memory for x in written for memory in _memory(x))


def lies_in(node: fx.Node, memory: frozenset[int]) -> bool:
    """Say whether some of a node's tensors lie in such memory."""
    return not memory.isdisjoint(_memory(node))


def any_written(nodes: Iterable[fx.Node], *, by_called_graphs: bool = True) -> bool:
    """Say whether the graph writes to memory of any of these nodes, or of what is made of it.

    Args:
        nodes: of the graph.
        by_called_graphs: whether graphs that an operator calls are taken to write to all they get.
    """
    stack = list(nodes)
    seen = set(stack)
    while stack:
        current = stack.pop()
        for user in current.users:
            is_call = isinstance(user.target, HigherOrderOperator)
            if _writes_to(user, current) and (by_called_graphs or not is_call):
                return True
            if user in seen or (user.target in MOVES and current not in sources(user)):
                continue  # or it reads no more than a dtype, as ``x.to(w)``
            if user.target in MOVES or _may_view(user, current):
                seen.add(user)
                stack.append(user)
    return False


def _writes_to(user: fx.Node, node: fx.Node) -> bool:
    """Say whether a node may write to this argument of its."""
    if not is_in_place(user):
        return False
    if statistics := _kept_statistics(user):
        return node in statistics
    writes_first = user.op == "call_method" or user.target in _IN_PLACE
    if writes_first and user.args and argument(user, "out") is None:
        return user.args[0] is node
    return True


def _kept_statistics(node: fx.Node) -> list[fx.Node]:
    """Return the running statistics that a norm of a batch writes to."""
    trains = argument(node, "training")
    if node.target is F.instance_norm:
        trains = argument(node, "use_input_stats") is not False
    if not trains:
        return []
    held = (argument(node, name) for name in ("running_mean", "running_var"))
    return [statistic for statistic in held if isinstance(statistic, fx.Node)]


def _may_view(user: fx.Node, viewed: fx.Node) -> bool:
    """Say whether a node's result may lie in the memory of one of its arguments.

    Fake views share the storage of their base; those of a stored weight are of values that it does
    not have, and have a storage of their own.
    """
    if isinstance(dynamo.value(viewed), QuantizedTensor):
        return "omniq_site" not in user.meta
    return not set(_memory(user)).isdisjoint(_memory(viewed))


# Of a copied node, in ``meta``: memory in its values -> the memory that it stands for.
_STANDS_FOR = "omniq_memory"


def _memory(node: fx.Node) -> list[int]:
    """Identify the memory of a node's tensors: Dynamo's fake views share that of their base.

    ``_cdata`` is private, checked on torch 2.11 to 2.15: fake memory has no address.
    """
    values = map(dynamo.unwrapped, torch.utils._pytree.tree_leaves(dynamo.value(node)))
    strided = (v for v in values if isinstance(v, torch.Tensor) and v.layout is torch.strided)
    stands_for = node.meta.get(_STANDS_FOR, {})
    found = [v.untyped_storage()._cdata for v in strided]
    return [stands_for.get(memory, memory) for memory in found]


def called_with(call_inputs: Mapping[fx.Node, Any], copies: Iterable[fx.Node]) -> None:
    """Note what memory the inputs of a called graph are in one call of it.

    The fake values of its nodes are those of the call that it was traced in.

    Args:
        call_inputs: what the call has for each placeholder of the graph.
        copies: of its nodes, which take the place of the call.
    """
    memory: dict[int, int] = {}
    for inner, outer in call_inputs.items():
        if isinstance(outer, fx.Node):
            memory.update(zip(_memory(inner), _memory(outer), strict=False))
    for copy in copies:
        before = copy.meta.get(_STANDS_FOR, {})
        copy.meta[_STANDS_FOR] = memory | {k: memory.get(v, v) for k, v in before.items()}
