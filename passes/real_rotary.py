"""Rotary embeddings written with complex numbers, as real arithmetic.

Inductor generates no code for complex tensors: each multiplication is an operator of its own, for
which q and k are stored in float32. Real arithmetic is computed along with the norm before it and
the concatenation behind it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from omniq_compile.passes import dynamo
from omniq_compile.passes.context import Context
from omniq_compile.passes.metadata import add_call, call_fake

# Exported models are made of torch.ops.aten.
_AS_COMPLEX = (torch.view_as_complex, torch.ops.aten.view_as_complex.default)
_AS_REAL = (torch.view_as_real, torch.ops.aten.view_as_real.default)
_MULTIPLY = (operator.mul, torch.mul, "mul", torch.ops.aten.mul.Tensor)


def real_rotary(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Replace ``view_as_real(view_as_complex(x) * frequencies)`` by its real arithmetic.

    That is ``x * real + turned * imaginary``, where ``turned`` is ``x`` times i. ``x`` is float32
    ``[..., 2]``, the frequencies are complex64 ``[...]``, on either side, and what comes before the
    2 is broadcast. What else there is of complex numbers is left: products that something reads as
    complex numbers, other dtypes, and frequencies that are conjugated lazily.

    PyTorch computes the same products and sums. Which of them round once together (FMA) is up to
    the compiler and to the length of a row, so each result is within
    ``2**-23 * (|first product| + |second product|)`` of the exact one, before as after.
    """
    for product in list(gm.graph.nodes):
        if _is_rotation(product):
            _replace(product)
    return gm


def _is_rotation(node: fx.Node) -> bool:
    return (
        _calls(node, _MULTIPLY, 2)
        and all(_is_plain(operand) for operand in node.args)
        and any(_calls(operand, _AS_COMPLEX, 1) for operand in node.args)
        and bool(node.users)
        and all(_calls(user, _AS_REAL, 1) for user in node.users)
    )


def _calls(node: Any, targets: tuple[Any, ...], num_arguments: int) -> bool:
    """Say whether a node calls one of these functions with so many arguments, and none by name."""
    return node.target in targets and len(node.args) == num_arguments and not node.kwargs


def _is_plain(operand: Any) -> bool:
    """Say whether a value is complex64, and its memory holds just that."""
    if not dynamo.is_tensor(operand):
        return False
    value = dynamo.value(operand)
    if value.dtype is not torch.complex64 or value.is_conj() or value.is_neg():
        return False
    # In-place operations may have given what was viewed another shape since.
    return not _calls(operand, _AS_COMPLEX, 1) or _looks_alike(
        call_fake(torch.view_as_real, value), dynamo.value(operand.args[0])
    )


def _looks_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether tensors have equal sizes, and strides too, which views of them rely on."""
    return one.dim() == other.dim() and all(
        statically_known_true(size == other_size)
        and (statically_known_true(size == 1) or statically_known_true(stride == other_stride))
        for size, other_size, stride, other_stride in zip(
            one.shape, other.shape, one.stride(), other.stride(), strict=True
        )
    )


def _replace(product: fx.Node) -> None:
    graph, operands, views = product.graph, product.all_input_nodes, list(product.users)
    added: list[fx.Node] = []

    def call(function: Callable[..., Any], *arguments: Any) -> fx.Node:
        added.append(add_call(product, function, *arguments))
        return added[-1]

    def pairs(operand: Any) -> Any:
        is_view = _calls(operand, _AS_COMPLEX, 1)
        return operand.args[0] if is_view else call(torch.view_as_real, operand)

    # Not as a stack of both sums: that is as much of an expression as makes Inductor store its
    # result, in float32, where this one is written into the concatenation behind it.
    with graph.inserting_before(product):
        view_first = sorted(product.args, key=lambda operand: not _calls(operand, _AS_COMPLEX, 1))
        x, frequencies = map(pairs, view_first)
        real, imaginary = (call(torch.narrow, frequencies, -1, part, 1) for part in (0, 1))
        first, second = (call(torch.select, x, -1, part) for part in (0, 1))
        turned = call(torch.stack, [call(operator.neg, second), first], -1)
        terms = call(operator.mul, x, real), call(operator.mul, turned, imaginary)
        rotated = call(operator.add, *terms)
    if all(_looks_alike(dynamo.value(rotated), dynamo.value(view)) for view in views):
        for view in views:
            view.replace_all_uses_with(rotated)
        unused = [*views, product, *(node for node in operands if node.target in _AS_COMPLEX)]
    else:
        unused = added[::-1]
    for node in unused:
        if not node.users:
            graph.erase_node(node)
