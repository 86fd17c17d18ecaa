"""Rotary embeddings written with complex numbers, as real arithmetic.

Inductor generates no code for complex tensors: each multiplication is an operator of its own, for
which q and k are stored in float32. Real arithmetic is computed along with the norm before it and
the concatenation behind it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from omniq_compile.passes import dynamo
from omniq_compile.passes.complex_parts import ComplexParts, is_plain, is_view_of_pairs
from omniq_compile.passes.context import Context
from omniq_compile.passes.metadata import add_call, looks_alike

# Exported models are made of torch.ops.aten.
_AS_REAL = (torch.view_as_real, torch.ops.aten.view_as_real.default)
_MULTIPLY = (operator.mul, torch.mul, "mul", torch.ops.aten.mul.Tensor)


def real_rotary(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Replace ``view_as_real(view_as_complex(x) * frequencies)`` by its real arithmetic.

    That is ``x * real + turned * imaginary``, where ``turned`` is ``x`` times i. ``x`` is float32
    ``[..., 2]``, the frequencies are complex64 ``[...]``, on either side, and what comes before the
    2 is broadcast. Where the frequencies are cut and joined from a table, its two parts are. What
    else there is of complex numbers is left: products that something reads as complex numbers,
    other dtypes, and frequencies that are conjugated lazily.

    PyTorch computes the same products and sums. Which of them round once together (FMA) is up to
    the compiler and to the length of a row, so each result is within
    ``2**-23 * (|first product| + |second product|)`` of the exact one, before as after.
    """
    parts = ComplexParts(gm.graph)
    products = [node for node in gm.graph.nodes if _is_rotation(node)]
    operands: list[Any] = [operand for product in products for operand in product.args]
    for product in products:
        _replace(product, parts)
    parts.erase_unused(operands)
    return gm


def _is_rotation(node: fx.Node) -> bool:
    return (
        _calls(node, _MULTIPLY, 2)
        and all(is_plain(operand) for operand in node.args)
        and any(is_view_of_pairs(operand) for operand in node.args)
        and bool(node.users)
        and all(_calls(user, _AS_REAL, 1) for user in node.users)
    )


def _calls(node: Any, targets: tuple[Any, ...], num_arguments: int) -> bool:
    """Say whether a node calls one of these functions with so many arguments, and none by name."""
    return node.target in targets and len(node.args) == num_arguments and not node.kwargs


def _replace(product: fx.Node, parts: ComplexParts) -> None:
    graph, views = product.graph, list(product.users)
    added: list[fx.Node] = []

    def call(function: Callable[..., Any], *arguments: Any) -> fx.Node:
        added.append(add_call(product, function, *arguments))
        return added[-1]

    # Not as a stack of both sums: that is as much of an expression as makes Inductor store its
    # result, in float32, where this one is written into the concatenation behind it.
    operands: Sequence[Any] = product.args
    pairs, frequencies = sorted(operands, key=lambda operand: not is_view_of_pairs(operand))
    x = pairs.args[0]
    with graph.inserting_before(product):
        real, imaginary = (call(torch.unsqueeze, part, -1) for part in parts.of(frequencies))
        first, second = (call(torch.select, x, -1, part) for part in (0, 1))
        turned = call(torch.stack, [call(operator.neg, second), first], -1)
        terms = call(operator.mul, x, real), call(operator.mul, turned, imaginary)
        rotated = call(operator.add, *terms)
    unused = added[::-1]
    if all(looks_alike(dynamo.value(rotated), dynamo.value(view)) for view in views):
        for view in views:
            view.replace_all_uses_with(rotated)
        unused = [*views, product]
    for node in unused:
        if not node.users:
            graph.erase_node(node)
