"""Replaces quantize and GEMM nodes with the operations of the kernels that were chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from omniq_compile.lowering.registry import Kernel
from omniq_compile.passes.context import Context
from omniq_compile.passes.metadata import fill_values
from omniq_compile.passes.rewrite import GEMM, QUANTIZE
from omniq_compile.passes.sites import Site


def lower(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Trace each site's kernel into the graph, in place of its operators."""
    graph = gm.graph
    quantized: dict[tuple[fx.Node, Any], list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node.target is not GEMM:
            continue
        site: Site = node.meta["omniq_site"]
        kernel = site.decision.kernel
        assert kernel is not None
        a, b, bias = node.args[:3]
        parts = [_parts(context, graph, operand, kernel, quantized) for operand in (a, b)]

        def gemm(
            a: Any, b: Any, bias: Any, kernel: Kernel = kernel, problem: Any = site.problem
        ) -> Any:
            return kernel.gemm(a, b, bias, problem)

        result = _inline(context, graph, node, gemm, (*parts, bias))
        result.meta |= {k: node.meta[k] for k in ("omniq_site", "omniq_name") if k in node.meta}
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        if site.node is node:
            site.node = result
    for node in reversed(list(graph.nodes)):
        if node.target is QUANTIZE:
            graph.erase_node(node)
    return gm


def _parts(
    context: Context,
    graph: fx.Graph,
    operand: Any,
    kernel: Kernel,
    quantized: dict[Any, list[fx.Node]],
) -> list[fx.Node]:
    """Return an operand's parts: a weight's placeholders, or an activation quantized here."""
    if not isinstance(operand, fx.Node):
        return list(operand)
    key = (operand, kernel.quantize)
    if key not in quantized:
        quantized[key] = list(_inline(context, graph, operand, kernel.quantize, operand.args[:1]))
    return quantized[key]


def _inline(
    context: Context, graph: fx.Graph, at: fx.Node, function: Callable[..., Any], args: Any
) -> Any:
    """Run a kernel's function on proxies, so that its operations land in the graph before `at`."""
    tracer = GraphAppendingTracer(graph)

    def proxy_of(node: fx.Node) -> Any:
        return fx.Proxy(node, tracer)

    before = at.prev
    with graph.inserting_before(at):
        result = function(*fx.map_arg(args, proxy_of))
    node = before.next
    while node is not at:
        for key in ("nn_module_stack", "stack_trace"):
            if key in at.meta:
                node.meta[key] = at.meta[key]
        if context.stages is not None:
            # Only for reading: what compiles the graph next finds shapes for itself.
            fill_values(node)
        node = node.next
    if isinstance(result, tuple):
        return [proxy.node for proxy in result]
    return result.node
