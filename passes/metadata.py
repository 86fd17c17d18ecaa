"""Shapes and dtypes for nodes that a pass adds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

# Private, checked on torch 2.11 to 2.15.
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from omniq_compile.lowering import ops
from omniq_compile.lowering.tensor_of_parts import inner_tensors
from omniq_compile.passes import dynamo

# Operators of ours that say what they return far faster than their dispatch would: it adds a
# second to a model of a hundred linears.
_LIKE: dict[Any, Callable[..., Any]] = {
    torch.ops.omniq.quantize.default: ops.quantize_like,
    torch.ops.omniq.gemm.default: ops.gemm_like,
}


def fill_values(node: fx.Node) -> None:
    """Give a new node its value by running it on the fake values of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), dynamo.value)
    if node.op == "call_method":
        method = getattr(args[0], str(node.target))
        dynamo.set_value(node, call_fake(method, *args[1:], **kwargs))
    elif node.op == "call_function":
        function: Any = _LIKE.get(node.target, node.target)
        dynamo.set_value(node, call_fake(function, *args, **kwargs))


def add_call(of: fx.Node, function: Callable[..., Any], *arguments: Any) -> fx.Node:
    """Add a call that is part of what a node does, with that node's place in the model."""
    return placed(of.graph.call_function(function, arguments), of)


def add_method(of: fx.Node, name: str, *arguments: Any) -> fx.Node:
    """Add a call of the first argument's method; see `add_call`."""
    return placed(of.graph.call_method(name, arguments), of)


def placed(node: fx.Node, of: fx.Node) -> fx.Node:
    """Give a new node the place in the model of the one that it is part of, and its value."""
    dynamo.copy_place(node, of)
    fill_values(node)
    return node


def call_fake(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function on fake values, as those of nodes are."""
    owner = getattr(function, "__self__", None)
    # Some operators' fakes read symbolic sizes as numbers unless their Python decompositions serve:
    # `torch.nn.functional.pad` would fix a dynamic size to what it is in this call.
    with fake_mode((owner, args)), enable_python_dispatcher(), torch.no_grad():
        return function(*args, **kwargs)


def fake_mode(arguments: Any) -> Any:
    """Return the fake mode of the first fake tensor among the arguments; without one, a context
    that does nothing.
    """
    for argument in torch.utils._pytree.tree_leaves(arguments):
        if is_traceable_wrapper_subclass(argument):
            return fake_mode(inner_tensors(argument))
        if hasattr(argument, "fake_mode"):
            return argument.fake_mode
    return nullcontext()


def looks_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether tensors have equal sizes, and strides too, which views of them rely on."""
    return one.dim() == other.dim() and all(
        statically_known_true(size == other_size)
        and (statically_known_true(size == 1) or statically_known_true(stride == other_stride))
        for size, other_size, stride, other_stride in zip(
            one.shape, other.shape, one.stride(), other.stride(), strict=True
        )
    )
