"""Every spelling of a matrix product, and how it reads in the normal form.

Adding a spelling is adding a function and a row to `SPELLINGS`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from omniq_compile.passes import dynamo
from omniq_compile.passes.einsum import read_einsum, read_tensordot
from omniq_compile.passes.expression import is_the_weight
from omniq_compile.passes.sites import TRANSPOSE, Operand, Product, product_of_several


def _rank(node: fx.Node) -> int:
    return int(dynamo.value(node).dim())


Reader = Callable[[fx.Node], Product | None]

# What torch.ops.aten calls the first argument.
_INPUT = {"self": "input"}


def named_arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """Bind positional and keyword arguments to the names that the operator gives them."""
    keywords = {_INPUT.get(name, name): value for name, value in node.kwargs.items()}
    return dict(zip(names, node.args, strict=False)) | keywords


def _linear(node: fx.Node) -> Product:
    arguments = named_arguments(node, ("input", "weight", "bias"))
    x, weight = arguments["input"], arguments["weight"]
    bias = arguments.get("bias")
    if _rank(weight) != 2:
        return _vector(x, weight)
    if _rank(x) == 1:
        return Product(
            Operand(x, (("unsqueeze", (0,)),)),
            Operand(weight),
            bias,
            out_steps=(("squeeze", (0,)),),
        )
    return Product(Operand(x), Operand(weight), bias)


def _vector(a: fx.Node, b: fx.Node) -> Product:
    return Product(Operand(a), Operand(b), unsupported="one operand is a vector, not a matrix")


def _product(a: fx.Node, b: fx.Node) -> Product:
    """``a @ b``; where only ``a`` is a weight, as ``(b.T @ a.T).T``, so that it is the second."""
    if _rank(b) == 1 or _rank(a) == 0:
        return _vector(a, b)
    if _rank(a) == 1:
        if _rank(b) != 2:
            return _vector(a, b)
        return Product(
            Operand(a, (("unsqueeze", (0,)),)),
            Operand(b, (TRANSPOSE,)),
            out_steps=(("squeeze", (0,)),),
        )
    if is_the_weight(a, b):
        return Product(Operand(b, (TRANSPOSE,)), Operand(a), out_steps=(TRANSPOSE,))
    return Product(Operand(a), Operand(b, (TRANSPOSE,)))


def _matmul(node: fx.Node) -> Product:
    arguments = named_arguments(node, ("input", "other"))
    return _product(arguments["input"], arguments["other" if "other" in arguments else "mat2"])


def _matmul_reversed(node: fx.Node) -> Product:
    arguments = named_arguments(node, ("other", "input"))
    return _product(arguments["input"], arguments["other"])


def _inner(node: fx.Node) -> Product:
    arguments = named_arguments(node, ("input", "other"))
    a, b = arguments["input"], arguments["other"]
    if _rank(a) < 2 or _rank(b) != 2:
        return Product(Operand(a), Operand(b), unsupported="an inner product of these ranks")
    if is_the_weight(a, b):
        return Product(Operand(b), Operand(a), out_steps=(TRANSPOSE,))
    return Product(Operand(a), Operand(b))


def _added(node: fx.Node) -> Product:
    """addmm and baddbmm: ``beta * input + alpha * (a @ b)``."""
    names = ("input", "a", "b")
    aliases = {"mat1": "a", "mat2": "b", "batch1": "a", "batch2": "b", **_INPUT}
    bound: dict[str, Any] = dict(zip(names, node.args, strict=False))
    bound |= {aliases.get(k, k): v for k, v in node.kwargs.items()}
    if not all(dynamo.is_tensor(bound.get(name)) for name in names):
        tensors = [n for n in node.all_input_nodes if dynamo.is_tensor(n)]
        return product_of_several(tensors, "its factors come first, a form that torch deprecated")
    product = _product(bound["a"], bound["b"])
    return Product(
        product.a,
        product.b,
        bias=bound["input"],
        alpha=bound.get("alpha", 1),
        beta=bound.get("beta", 1),
        out_steps=product.out_steps,
        unsupported=product.unsupported,
    )


def _added_into(node: fx.Node) -> Product:
    """``input.addmm_(a, b)``, and the same of others."""
    return replace(_added(node), unsupported="it writes into its input")


def _other(node: fx.Node) -> Product:
    """Products of a vector, of more than two tensors, or summed over a batch, in one call."""
    return product_of_several(node.all_input_nodes, "it is not a product of two matrices")


def _grouped(node: fx.Node) -> Product:
    """Mixtures of experts: each group of rows times a matrix of its own."""
    reason = "it multiplies groups of rows by a matrix each, in one call"
    return product_of_several(node.all_input_nodes, reason)


def _cell(node: fx.Node) -> Product:
    """All of a `torch.nn.GRUCell` and its like."""
    return product_of_several(node.all_input_nodes, "PyTorch computes its products in one call")


def _attention(node: fx.Node) -> Product:
    """All of `torch.nn.MultiheadAttention`, of which Dynamo makes one node."""
    before = (
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight",
        "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight",
    )  # fmt: skip
    arguments = named_arguments(node, before)
    return _in_one_call(arguments["query"], arguments["out_proj_weight"])


def _encoder_layer(node: fx.Node) -> Product:
    """All of a `torch.nn.TransformerEncoderLayer`, in eval mode and without gradients."""
    before = ("src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight")
    arguments = named_arguments(node, before)
    return _in_one_call(arguments["src"], arguments["proj_weight"])


def _in_one_call(x: fx.Node, weight: fx.Node) -> Product:
    reason = "PyTorch computes its products and its attention in one call"
    return Product(Operand(x), Operand(weight), unsupported=reason)


# (name shown in a dump, FX targets, reader)
_ROWS: tuple[tuple[str, tuple[Any, ...], Reader], ...] = (
    ("linear", (torch.nn.functional.linear, torch._C._nn.linear), _linear),
    ("@", (operator.matmul, operator.imatmul, "__matmul__"), _matmul),
    ("@", ("__rmatmul__",), _matmul_reversed),
    ("matmul", (torch.matmul, torch.linalg.matmul, "matmul"), _matmul),
    ("mm", (torch.mm, "mm"), _matmul),
    ("bmm", (torch.bmm, "bmm"), _matmul),
    ("inner", (torch.inner, "inner"), _inner),
    ("addmm", (torch.addmm, "addmm"), _added),
    ("baddbmm", (torch.baddbmm, "baddbmm"), _added),
    ("addmm_", ("addmm_",), _added_into),
    ("baddbmm_", ("baddbmm_",), _added_into),
    ("einsum", (torch.einsum, torch.functional.einsum), read_einsum),
    ("tensordot", (torch.tensordot,), read_tensordot),
    ("mv", (torch.mv, "mv"), _other),
    ("addmv", (torch.addmv, "addmv", "addmv_"), _other),
    ("addbmm", (torch.addbmm, "addbmm", "addbmm_"), _other),
    ("bilinear", (torch.nn.functional.bilinear, torch.bilinear), _other),
    ("multi_dot", (torch.linalg.multi_dot, torch.chain_matmul), _other),
    ("grouped_mm", (torch.nn.functional.grouped_mm, torch._grouped_mm), _grouped),
    (
        "cell",
        (torch.gru_cell, torch.lstm_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell),
        _cell,
    ),
    ("attention", (torch.nn.functional.multi_head_attention_forward,), _attention),
    # Private, and what Dynamo puts into graphs: checked on torch 2.11 to 2.15.
    ("encoder layer", (torch._transformer_encoder_layer_fwd,), _encoder_layer),
)

# Of torch.ops.aten, which exported models are made of.
_OPERATORS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"}

SPELLINGS: dict[Any, tuple[str, Reader]] = {
    target: (name, reader) for name, targets, reader in _ROWS for target in targets
} | {
    target: (name, reader)
    for name, _, reader in _ROWS
    if name in _OPERATORS
    for target in (getattr(torch.ops.aten, name), getattr(torch.ops.aten, name).default)
}
