"""Operations that make one weight of several parameters: a norm, a scale, an adapter's product.

Each is deterministic, writes to nothing but an ``out``, and its result is of some size that does
not depend on values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from omniq_compile.passes import dynamo

# By the name of a method, and of the function of torch's where there is one.
_NAMES = (
    "abs", "absolute", "add", "addcdiv", "addcmul", "addmm", "amax", "amin", "baddbmm", "bmm",
    "clamp", "clamp_max", "clamp_min", "clip", "cos", "div", "divide", "dot", "einsum", "exp",
    "expm1", "ge", "gt", "inner", "kron", "le", "lerp", "log", "log1p", "lt", "matmul",
    "maximum", "mean", "minimum", "mm", "mul", "multiply", "mv", "neg", "negative", "norm",
    "outer", "pow", "prod", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sign", "sin",
    "softmax", "sqrt", "square", "std", "sub", "subtract", "sum", "tanh", "tril", "triu",
    "true_divide", "var", "vdot", "where",
)  # fmt: skip

# Of torch.ops.aten, which exported models are made of.
_OPERATORS = (
    "abs", "add", "addmm", "amax", "bmm", "clamp", "clamp_min", "div", "dot", "exp", "linalg_norm",
    "linalg_vector_norm", "matmul", "mean", "mm", "mul", "mv", "neg", "norm", "pow", "reciprocal",
    "rsqrt", "sigmoid", "softplus", "sqrt", "sub", "sum", "tanh", "vdot",
)  # fmt: skip


def _of_torch() -> Iterable[Any]:
    functional = torch.nn.functional
    yield from (getattr(torch, name) for name in _NAMES if hasattr(torch, name))
    yield from (getattr(functional, n) for n in ("normalize", "relu", "sigmoid", "softmax", "tanh"))
    # Private, and what Dynamo puts into graphs: checked on torch 2.11 to 2.15.
    yield from (functional.softplus, torch._C._nn.softplus, torch._weight_norm)
    yield from (torch.functional.einsum, torch.functional.norm)
    for name in ("norm", "vector_norm", "matrix_norm"):
        yield getattr(torch.linalg, name)
    for name in _OPERATORS:
        packet = getattr(torch.ops.aten, name)
        yield from (getattr(packet, overload) for overload in packet.overloads())


WEIGHT_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *_NAMES, "__abs__",
        operator.abs, operator.add, operator.ge, operator.gt, operator.le, operator.lt,
        operator.matmul, operator.mul, operator.neg, operator.pow, operator.sub,
        operator.truediv,
        *_of_torch(),
    }
)  # fmt: skip

# What Dynamo makes of NumPy's functions of numbers, and of operators on their results. Private,
# checked on torch 2.11 to 2.15.
_OF_NUMPY = {
    f"wrapped_{name}"
    for name in (
        "add", "divide", "exp", "float32", "float64", "log", "log2", "mul", "multiply", "neg",
        "pow", "power", "reciprocal", "sqrt", "square", "sub", "subtract", "true_divide", "truediv",
    )
}  # fmt: skip


def is_number_of_numpy(node: fx.Node) -> bool:
    """Say whether a node computes one number from constants by NumPy, as ``np.sqrt(K)`` does."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        target, value = current.target, dynamo.value(current)
        known = getattr(target, "__name__", "") in _OF_NUMPY and not current.kwargs
        if not known or type(target).__module__ != "torch._dynamo.utils":
            return False
        if not isinstance(value, torch.Tensor) or value.dim() > 0:
            return False
        stack += [n for n in current.all_input_nodes if n not in seen]
        seen.update(current.all_input_nodes)
    return True
