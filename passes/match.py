"""Finds the GEMM sites."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.lowering.registry import Problem
from omniq_compile.passes import dynamo, expression
from omniq_compile.passes.expression import WeightExpression
from omniq_compile.passes.layer_names import layer_name
from omniq_compile.passes.metadata import fake_mode
from omniq_compile.passes.sites import Kind, Operand, Product, Site
from omniq_compile.passes.spellings import SPELLINGS


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """Return every product of the graph as a site, undecided, in the graph's order.

    The graph stays as it is, but for each site's node, which carries its site in ``meta``: a site
    that is kept remains the very node it was, so that its numbers do not change.
    """
    sites = []
    casting = dynamo.under_autocast(gm.graph)
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method") or node.target not in SPELLINGS:
            continue
        if not isinstance(dynamo.first_value(node), torch.Tensor):
            continue
        name, reader = SPELLINGS[node.target]
        product = reader(node)
        if product is not None:
            if node.kwargs.get("out") is not None:
                # Rewritten, it would return a new tensor and leave that one as it was.
                product = replace(product, unsupported="it writes into out=")
            if dynamo.is_batched(node):
                product = replace(product, unsupported="it runs under vmap")
            site = _site(node, name, product, node in casting)
            node.meta["omniq_site"] = site
            sites.append(site)
    return sites


def _site(node: fx.Node, spelling: str, product: Product, autocast: bool) -> Site:
    a_is_weight = expression.is_expression(product.a.node)
    b_is_weight = expression.is_expression(product.b.node)
    kind = Kind.ACTIVATION
    if b_is_weight:
        kind = Kind.CONSTANT if a_is_weight else Kind.WEIGHT
    weight = None
    if kind is Kind.WEIGHT and product.unsupported is None:
        weight = expression.build(product.b.node, product.b.steps)
    names = [dynamo.weight_name(leaf) for leaf in weight.leaves] if weight else []
    return Site(
        node=node,
        spelling=spelling,
        layer=layer_name(names, dynamo.layer_name(node)),
        kind=kind,
        product=product,
        problem=None if product.unsupported else _problem(node, product, weight is not None),
        weight=weight,
        weight_name=" + ".join(names),
        around=dynamo.modules_around(node),
        stored=_stored(weight),
        autocast=autocast,
    )


def _stored(weight: WeightExpression | None) -> QuantizedTensor | None:
    value = dynamo.value(weight.leaves[0]) if weight and weight.is_parameter else None
    return value if isinstance(value, QuantizedTensor) else None


def _problem(node: fx.Node, product: Product, b_is_weight: bool) -> Problem:
    a, b = _layout(product.a), _layout(product.b)
    dtype = dynamo.value(node).dtype
    M = math.prod(a.shape[:-1]) if b.dim() == 2 else a.shape[-2]
    K, N = (dynamo.known(size) for size in (a.shape[-1], b.shape[-2]))
    return Problem(dynamo.known(M), K, N, a.dim(), b.dim(), dtype, b_is_weight)


def _layout(operand: Operand) -> Any:
    value = dynamo.value(operand.node)
    with fake_mode(value), torch.no_grad():
        for name, arguments in operand.steps:
            value = getattr(value, name)(*arguments)
    return value
