"""Finds the GEMM sites."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves

from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.tensor_of_parts import foreign_kind
from omniq_compile.passes import dynamo, expression, writes
from omniq_compile.passes.expression import WeightExpression
from omniq_compile.passes.layer_names import layer_name
from omniq_compile.passes.metadata import fake_mode
from omniq_compile.passes.sites import (
    Kind,
    Operand,
    Product,
    Site,
    bias_in_epilogue,
    is_one,
    product_of_several,
)
from omniq_compile.passes.spellings import SPELLINGS


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """Return every product of the graph as a site, undecided, in the graph's order.

    The graph stays as it is, but for each site's node, which carries its site in ``meta``: a site
    that is kept remains the very node it was, so that its numbers do not change. Products in graphs
    that an operator calls, such as the branches of `torch.cond`, are sites that are kept.
    """
    sites: list[Site] = []
    casting = dynamo.under_autocast(gm.graph)
    expression.find_computed(gm.graph, casting)
    reshaped = writes.reshaped_later(gm.graph)
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            sites += _sites_inside(gm, node, {})
            continue
        product = _read(node, reshaped)
        if product is not None:
            if writes.argument(node, "out") is not None:
                # Rewritten, it would return a new tensor and leave that one as it was.
                product = replace(product, unsupported="it writes into out=")
            if dynamo.is_transformed(node):
                product = replace(product, unsupported="it runs under torch.func, such as vmap")
            if _has_unknown_size(product.b.node):
                product = replace(product, unsupported="its weight has a size that calls decide")
            if kinds := _kinds_of_tensors(product):
                product = replace(product, unsupported=f"it multiplies a {' and a '.join(kinds)}")
            site = _site(node, product, node in casting)
            node.meta["omniq_site"] = site
            sites.append(site)
    return sites


def _has_unknown_size(operand: fx.Node) -> bool:
    """Say whether an operand is a weight that cannot be made before a call, for want of a size."""
    if not expression.is_of_parameters(operand):
        return False
    return not all(isinstance(dynamo.known(n), int) for n in dynamo.value(operand).shape)


def _kinds_of_tensors(product: Product) -> list[str]:
    """Name the classes of operands that are made of other tensors: kernels read none but ours."""
    values = [dynamo.value(operand.node) for operand in (product.a, product.b)]
    return [kind for kind in map(foreign_kind, values) if kind]


def _read(node: fx.Node, reshaped: Container[fx.Node]) -> Product | None:
    if node.op not in ("call_function", "call_method") or node.target not in SPELLINGS:
        return None
    if not isinstance(dynamo.first_value(node), torch.Tensor):
        return None
    if node in reshaped:
        # How its tensors look at this node is no more known.
        tensors = [n for n in node.all_input_nodes if dynamo.is_tensor(n)]
        return product_of_several(tensors, "the shape of one of its tensors is changed in place")
    return SPELLINGS[node.target][1](node)


def _sites_inside(
    gm: fx.GraphModule, call: fx.Node, outside: dict[fx.Node, fx.Node]
) -> Iterator[Site]:
    """Yield the products in the graphs that a call is given, and in those that these call.

    ``outside`` are the inputs of the whole graph that inputs of ``gm`` are.
    """
    given = [n for n in tree_leaves((call.args, call.kwargs)) if isinstance(n, fx.Node)]
    graphs = {n: dynamo.called_graph(gm, n) for n in given}
    # Weights come last, after what only some of the graphs get, such as a condition.
    operands = [outside.get(n, n) for n, graph in graphs.items() if graph is None]
    for graph in filter(None, graphs.values()):
        reshaped = writes.reshaped_later(graph.graph)
        inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
        known = dict(zip(reversed(inputs), reversed(operands), strict=False))
        for node in graph.graph.nodes:
            if isinstance(node.target, HigherOrderOperator):
                yield from _sites_inside(graph, node, known)
            elif (product := _read(node, reshaped)) is not None:
                reason = f"in a graph that {call.target} runs, which is compiled as it stands"
                site = _site(node, replace(product, unsupported=reason), autocast=False)
                weight = known.get(product.b.node)
                if weight is not None and dynamo.is_weight(weight):
                    name = dynamo.weight_name(weight)
                    layer = layer_name([name], site.layer)
                    site = replace(site, kind=Kind.WEIGHT, layer=layer, weight_names=(name,))
                yield site


def _site(node: fx.Node, product: Product, autocast: bool) -> Site:
    a, b = product.a.node, product.b.node
    kind = Kind.ACTIVATION
    if expression.is_moved_weight(b):
        # What is computed from parameters, such as learned tokens, is multiplied as any input.
        kind = Kind.CONSTANT if expression.is_moved_weight(a) else Kind.WEIGHT
    elif expression.is_of_parameters(b) and not expression.is_of_parameters(a):
        kind = Kind.WEIGHT
    weight = None
    if kind is Kind.WEIGHT and product.unsupported is None:
        weight = expression.build(product.b.node, product.b.steps)
    names = [dynamo.weight_name(leaf) for leaf in weight.leaves] if weight else []
    return Site(
        node=node,
        spelling=SPELLINGS[node.target][0],
        layer=_layer(node, names),
        kind=kind,
        product=product,
        problem=None if product.unsupported else _problem(node, product, weight is not None),
        weight=weight,
        weight_names=tuple(names),
        around=dynamo.modules_around(node),
        stored=_stored(weight),
        autocast=autocast,
        gradients=dynamo.first_value(node).requires_grad,
    )


def _layer(node: fx.Node, weights: Sequence[str]) -> str:
    module = dynamo.module_name(node)
    if module and dynamo.is_in_linear(node):
        # Of a weight that several layers hold, Dynamo knows one name, the first layer's.
        return layer_name([], module)
    return layer_name(weights, module)


def _stored(weight: WeightExpression | None) -> QuantizedTensor | None:
    value = dynamo.value(weight.leaves[0]) if weight and weight.is_parameter else None
    return value if isinstance(value, QuantizedTensor) else None


def _problem(node: fx.Node, product: Product, b_is_weight: bool) -> Problem:
    a, b = _layout(product.a), _layout(product.b)
    M = math.prod(a.shape[:-1]) if b.dim() == 2 else a.shape[-2]
    K, N = (dynamo.known(size) for size in (a.shape[-1], b.shape[-2]))
    dtype = dynamo.value(node).dtype
    whole = product.bias is None or bias_in_epilogue(product, N)
    if dtype is torch.float16 and not (whole and is_one(product.alpha)):
        # PyTorch rounds once, behind the factor and the bias: a product alone may be too large.
        dtype = torch.float32
    return Problem(dynamo.known(M), K, N, a.dim(), b.dim(), dtype, b_is_weight)


def _layout(operand: Operand) -> Any:
    value = dynamo.value(operand.node)
    with fake_mode(value), torch.no_grad():
        for name, arguments in operand.steps:
            value = getattr(value, name)(*arguments)
    return value
