"""Replaces quantize and GEMM nodes with the operations of the kernels that were chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.proxy import GraphAppendingTracer

from omniq_compile.lowering.registry import as_stored
from omniq_compile.passes import dynamo
from omniq_compile.passes.arrange import arrange_weights
from omniq_compile.passes.context import Context
from omniq_compile.passes.metadata import fill_values
from omniq_compile.passes.rewrite import GEMM, QUANTIZE
from omniq_compile.passes.sites import Site


def lower(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Trace each site's kernel into the graph, in place of its operators."""
    inliner = _Inliner(gm.graph, arrange_weights(gm.graph, context))
    for node in list(gm.graph.nodes):
        if node.target is not GEMM:
            continue
        site: Site = node.meta["omniq_site"]
        result = inliner.gemm(node, site)
        result.meta |= {k: node.meta[k] for k in ("omniq_site", "omniq_name") if k in node.meta}
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
        if site.node is node:
            site.node = result
    for node in reversed(list(gm.graph.nodes)):
        if node.target is QUANTIZE:
            gm.graph.erase_node(node)
    return gm


class _Proxy(fx.Proxy):
    """A proxy that knows its tensor's rank, dtype and shape, so that kernels may depend on them.

    Symbolic sizes are proxies again: they stay computations of the graph.
    """

    @property
    def shape(self) -> tuple[Any, ...]:
        sizes = map(dynamo.known, dynamo.value(self.node).shape)
        return tuple(
            size if isinstance(size, int) else self.size(dim) for dim, size in enumerate(sizes)
        )

    @property
    def dtype(self) -> Any:
        return dynamo.value(self.node).dtype

    def dim(self) -> int:
        return int(dynamo.value(self.node).dim())

    def stride(self) -> tuple[Any, ...]:
        strides: tuple[Any, ...] = dynamo.value(self.node).stride()
        return strides


class _Tracer(GraphAppendingTracer):
    """Records operations on proxies, and gives each new node its value.

    Values are for `_Proxy`, for readers, and for AOTAutograd's cache, which takes a method call
    only on a node whose value it can see.
    """

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        # A model repeats a few shapes, and finding the value of one node takes half a millisecond.
        self._known: dict[Any, list[Any]] = {}
        self._values: list[Any] = []
        self._added = 0

    def start(self, key: Any) -> None:
        """Begin operations that are the same, on tensors that look the same, for equal keys."""
        self._values = self._known.setdefault(key, [])
        self._added = 0

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if self._added == len(self._values):
            fill_values(node)
            self._values.append(dynamo.value(node))
        dynamo.set_value(node, self._values[self._added])
        self._added += 1
        return node


class _Inliner:
    """Writes the operations of kernels into one graph."""

    def __init__(self, graph: fx.Graph, arranged: set[fx.Node]) -> None:
        """Take a graph, and the inputs that already are what the kernel of a weight reads."""
        self._graph = graph
        self._arranged = arranged
        self._tracer = _Tracer(graph)
        self._quantized: dict[Any, list[fx.Node]] = {}

    def gemm(self, node: fx.Node, site: Site) -> fx.Node:
        """Write a site's GEMM before its node; returns the result."""
        kernel, problem, scheme = site.decision.kernel, site.problem, site.decision.scheme
        assert kernel is not None
        assert problem is not None
        assert scheme is not None
        a: Any
        b: Any
        a, b, bias = node.args[:3]
        x = None
        if kernel.takes_matrices and problem.a_rank > 2 and isinstance(a, fx.Node):
            x = a.args[0]
        flat = x is not None
        weight = self._weight_parts(node, list(b), site) if site.weight else None
        # One that stays as it is comes as a list of one part.
        left = self._parts(a, site, flat) if isinstance(a, fx.Node) else self._as_is(node, a, site)
        parts = [left, weight or self._parts(b, site, False)]
        problem = dataclasses.replace(problem, a_rank=2 if flat else problem.a_rank)

        def function(a: Any, b: Any, bias: Any, x: Any) -> Any:
            out = kernel.gemm(a, b, bias, problem, scheme)
            return out.unflatten(0, x.shape[:-1]) if flat else out

        key = (kernel.name, str(problem), scheme)
        result: fx.Node = self._inline(node, function, (*parts, bias, x), key)
        return result

    def _weight_parts(self, at: fx.Node, parts: list[fx.Node], site: Site) -> list[fx.Node]:
        """Return a weight's parts as its kernel reads them: inputs, or arranged before ``at``."""
        kernel = site.decision.kernel
        assert kernel is not None
        if kernel.arrange is as_stored or parts[0] in self._arranged:
            return parts
        key = (tuple(parts), kernel.arrange)
        if key not in self._quantized:
            self._quantized[key] = self._inline(at, kernel.arrange, (parts,), (kernel.name,))
        return self._quantized[key]

    def _parts(self, operand: fx.Node, site: Site, flat: bool) -> list[fx.Node]:
        """Return the parts of an activation, which is quantized here.

        Args:
            flat: quantize it as a matrix, see `Kernel.takes_matrices`.
        """
        kernel = site.decision.kernel
        assert kernel is not None
        x, format = operand.args[0], str(operand.args[1])

        def function(x: Any) -> Any:
            x = x.flatten(0, -2) if flat else x
            # Codes are laid out as what they are made of, and such kernels read rows: those of a
            # transposed activation, such as a picture's channels, have to be made first.
            if kernel.takes_matrices and not statically_known_true(x.stride()[-1] == 1):
                x = x.contiguous()
            elif kernel.takes_matrices and _was_a_column(x):
                x = x.clone(memory_format=torch.contiguous_format)
            return kernel.quantize(x, format)

        key = (operand, kernel.quantize, flat)
        if key not in self._quantized:
            self._quantized[key] = self._inline(
                operand, function, (x,), (kernel.name, format, flat)
            )
        return self._quantized[key]

    def _as_is(self, at: fx.Node, parts: list[fx.Node], site: Site) -> list[fx.Node]:
        """Return an activation that is not quantized, in the dtype that its kernel takes."""
        kernel, scheme = site.decision.kernel, site.decision.scheme
        assert kernel is not None
        assert scheme is not None
        quantize, format = kernel.quantize, scheme.activation
        key = (kernel.name, format)
        result: list[fx.Node] = self._inline(at, lambda x: quantize(x, format), tuple(parts), key)
        return result

    def _inline(self, at: fx.Node, function: Callable[..., Any], args: Any, key: Any) -> Any:
        """Run a kernel's function on proxies, so that its operations land before ``at``."""

        def proxy_of(node: fx.Node) -> Any:
            return self._tracer.proxy(node)

        self._tracer.start((key, str(fx.map_arg(args, _looks))))
        before = at.prev
        with self._graph.inserting_before(at):
            result = function(*fx.map_arg(args, proxy_of))
        node = before.next
        while node is not at:
            node.meta["omniq_added"] = True
            dynamo.copy_place(node, at)
            node = node.next
        if isinstance(result, (tuple, list)):
            return [proxy.node for proxy in result]
        return result.node


def _was_a_column(x: Any) -> bool:
    """Say whether one row has strides of a column, (1, 1), which count as contiguous."""
    # Of a matrix with a symbolic size it is not known.
    if len(x.shape) != 2 or not all(isinstance(size, int) for size in x.shape):
        return False
    rows, columns = x.shape
    return rows == 1 and statically_known_true(x.stride()[0] < columns)


def _looks(node: fx.Node) -> Any:
    """What the operations on a tensor depend on, beside its values."""
    value = dynamo.value(node)
    return str((tuple(value.shape), value.dtype, value.stride(), value.device))
