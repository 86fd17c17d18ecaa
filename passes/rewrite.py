"""Puts quantize and GEMM nodes in where the policy decided so."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import Scheme
from omniq_compile.lowering.symbolic_sizes import traced_size
from omniq_compile.passes import dynamo
from omniq_compile.passes.context import Binding, Context
from omniq_compile.passes.expression import evaluate, is_of_parameters
from omniq_compile.passes.metadata import fake_mode, looks_alike, placed
from omniq_compile.passes.sites import Operand, Product, Site, bias_in_epilogue, is_one
from omniq_compile.passes.weight_functions import is_number_of_numpy
from omniq_compile.passes.writes import is_in_place

QUANTIZE = torch.ops.omniq.quantize.default
GEMM = torch.ops.omniq.gemm.default


def rewrite(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Replace every site that has a method by ``omniq.quantize`` and ``omniq.gemm``.

    A weight becomes new placeholders for its parts; equal weights share them.
    """
    bound: dict[Any, tuple[Binding, list[fx.Node]]] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for site in context.sites:
        if site.decision.method is None:
            continue
        graph, product = gm.graph, _renewed(site.product, replaced)
        with graph.inserting_before(site.node):
            a = _quantize(graph, site, product.a)
            if site.weight is None:
                b: Any = _quantize(graph, site, product.b)
            else:
                b = _bind(gm, site, bound)
            result = _laid_out(graph, site, _gemm(graph, site, product, a, b))
        result.meta["omniq_name"] = site.node.name
        site.node.replace_all_uses_with(result)
        graph.erase_node(site.node)
        replaced[site.node] = result
        site.node = result
    context.bindings = [binding for binding, _ in bound.values()]
    _drop_unused_weights(gm)
    return gm


def _renewed(product: Product, replaced: dict[fx.Node, fx.Node]) -> Product:
    """Name the nodes that stand now where the product's operands were found."""

    def operand(old: Operand) -> Operand:
        return Operand(replaced.get(old.node, old.node), old.steps)

    bias = replaced.get(product.bias, product.bias) if product.bias else None
    return dataclasses.replace(product, a=operand(product.a), b=operand(product.b), bias=bias)


def _steps(graph: fx.Graph, site: Site, node: fx.Node, steps: Any) -> fx.Node:
    for name, arguments in steps:
        node = _create(graph, site, "call_method", name, (node, *arguments))
    return node


def _create(graph: fx.Graph, site: Site, op: str, target: Any, args: Any) -> fx.Node:
    node = placed(graph.create_node(op, target, args), site.node)
    node.meta["omniq_site"] = site
    node.meta["omniq_added"] = True
    return node


def _quantize(graph: fx.Graph, site: Site, operand: Operand) -> fx.Node | list[fx.Node]:
    node = _steps(graph, site, operand.node, operand.steps)
    if _scheme(site).weight_only:
        return [node]
    return _create(graph, site, "call_function", QUANTIZE, (node, _scheme(site).activation))


def _gemm(graph: fx.Graph, site: Site, product: Product, a: Any, b: Any) -> fx.Node:
    bias = product.bias if bias_in_epilogue(product, _problem(site).N) else None
    scheme = _scheme(site)
    b_format = scheme.activation if site.weight is None else scheme.weight
    arguments = (a, b, bias, scheme.activation, b_format, _problem(site).dtype)
    gemm = _create(graph, site, "call_function", GEMM, arguments)
    result = _steps(graph, site, gemm, product.out_steps)
    if not is_one(product.alpha):
        result = _create(graph, site, "call_function", torch.mul, (result, product.alpha))
    if product.bias is not None and bias is None and product.beta != 0:
        term = product.bias
        if dynamo.value(term).dtype != site.dtype:  # as autocast does
            term = _create(graph, site, "call_method", "to", (term, site.dtype))
        if not is_one(product.beta):
            term = _create(graph, site, "call_function", torch.mul, (term, product.beta))
        result = _create(graph, site, "call_function", torch.add, (result, term))
    if dynamo.value(result).dtype != site.dtype:
        result = _create(graph, site, "call_method", "to", (result, site.dtype))
    return result


def _laid_out(graph: fx.Graph, site: Site, result: fx.Node) -> fx.Node:
    """Lay a result out in memory as the site's own: the model may take views of it."""
    wanted = dynamo.value(site.node)
    if looks_alike(dynamo.value(result), wanted):
        return result
    order = list(range(wanted.dim()))
    strides = [traced_size(stride) for stride in wanted.stride()]
    known = [stride for stride in strides if stride is not None]
    if len(known) == len(order):
        order.sort(key=lambda axis: -known[axis])
    moved = order != sorted(order)
    if moved:
        result = _create(graph, site, "call_method", "permute", (result, tuple(order)))
    result = _create(graph, site, "call_method", "contiguous", (result,))
    if moved:
        back = tuple(order.index(axis) for axis in range(len(order)))
        result = _create(graph, site, "call_method", "permute", (result, back))
    return result


def _scheme(site: Site) -> Scheme:
    assert site.decision.scheme is not None
    return site.decision.scheme


def _problem(site: Site) -> Problem:
    assert site.problem is not None
    return site.problem


def _bind(gm: fx.GraphModule, site: Site, bound: dict[Any, Any]) -> list[fx.Node]:
    """Return the placeholders that stand for the site's quantized weight."""
    weight, format = site.weight, _scheme(site).weight
    assert weight is not None
    key = (format, weight.key, weight.leaves)
    if key in bound:
        binding, placeholders = bound[key]
        bound[key] = (_with_layer(binding, site.layer), placeholders)
        return list(placeholders)
    values = [dynamo.value(leaf) for leaf in weight.leaves]
    with fake_mode(values), torch.no_grad():
        shaped = evaluate(weight, values)
        stored = site.stored
        parts = get_format(format).allocate(shaped) if stored is None else stored.parts
    placeholders = _add_placeholders(gm.graph, site, format, parts)
    leaves = tuple(
        leaf.name if leaf.op == "placeholder" else _attribute(gm, str(leaf.target))
        for leaf in weight.leaves
    )
    binding = Binding(
        format=format,
        expression=weight,
        leaves=leaves,
        parts=tuple(p.name for p in placeholders),
        layers=(site.layer,),
        shape=tuple(shaped.shape),
        dtype=shaped.dtype,
        stored=stored is not None,
    )
    bound[key] = (binding, placeholders)
    return placeholders


def _with_layer(binding: Binding, layer: str) -> Binding:
    layers = (*binding.layers, *(() if layer in binding.layers else (layer,)))
    return dataclasses.replace(binding, layers=layers)


def _add_placeholders(graph: fx.Graph, site: Site, format: str, parts: Any) -> list[fx.Node]:
    """Append one placeholder a part. Existing ones keep their places, so calls keep their order."""
    before = [n for n in graph.nodes if n.op == "placeholder"]
    anchor = before[-1] if before else None
    owner = site.layer or site.weight_name
    added = []
    for name, part in zip(get_format(format).parts, parts, strict=True):
        with graph.inserting_after(anchor) if anchor else graph.inserting_before(None):
            anchor = graph.placeholder(_identifier(f"{owner}_{name}"))
        anchor.target = anchor.name  # the name is made unique, the argument is named by the target
        dynamo.set_value(anchor, part)
        anchor.meta["omniq_weight"] = f"{owner}.{name}"
        dynamo.mark_weight_input(anchor)
        added.append(anchor)
    return added


def _identifier(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text).strip("_")


def _attribute(gm: fx.GraphModule, path: str) -> torch.Tensor:
    owner, _, name = path.rpartition(".")
    tensor = getattr(gm.get_submodule(owner), name)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _drop_unused_weights(gm: fx.GraphModule) -> None:
    """Erase weights, and what is computed of them alone, that nothing uses any more.

    Only these: any other unused node may have an effect, and is not ours to judge.
    """
    for node in reversed(list(gm.graph.nodes)):
        if node.users or node.op == "output":
            continue
        constant = is_of_parameters(node) or is_number_of_numpy(node)
        if constant and not is_in_place(node):
            gm.graph.erase_node(node)
