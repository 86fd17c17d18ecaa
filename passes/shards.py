"""Linears of distributed tensors, as tensor parallelism makes them, as each process computes them.

A linear of `DTensor`s becomes a linear of the parts of them that this process has, between what
takes a `DTensor` apart and what makes one. `DTensor` does the same itself, where no pass sees it:
a linear that is kept gives the numbers that it gave before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from omniq_compile.passes import dynamo
from omniq_compile.passes.metadata import add_call, add_method
from omniq_compile.passes.spellings import named_arguments


@dataclass(frozen=True)
class Distribute:
    """The function of a node that makes a `DTensor` of this process's part.

    Attributes:
        placements: one a dimension of the mesh.
    """

    placements: tuple[Any, ...]

    __name__ = "distribute"

    def __call__(self, local: torch.Tensor, like: Any) -> Any:
        """Return a tensor on the same mesh as ``like``."""
        return _tensors().DTensor.from_local(local, like.device_mesh, self.placements)


def multiply_shards(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace the linears of evenly sharded tensors; ``gm`` is changed and returned."""
    for node in list(gm.graph.nodes):
        if node.target is torch.nn.functional.linear and _is_distributed(dynamo.value(node)):
            operands = _operands(node)
            values = [dynamo.value(n) for n in (*operands, node)]
            if all(_is_distributed(v) and _is_even(v) for v in values) and _is_plain(values):
                divisor = _divisor(values[-1], *values[:-1])
                if divisor is not None:
                    _replace(gm.graph, node, operands, divisor)
    return gm


def _operands(linear: fx.Node) -> list[fx.Node]:
    """Return the input, the weight and, where there is one, the bias."""
    names = ("input", "weight", "bias")
    found = named_arguments(linear, names)
    return [found[name] for name in names if found.get(name) is not None]


def _is_plain(values: Sequence[Any]) -> bool:
    """Say whether a linear neither casts, as under autocast, nor has gradients; the last value is
    its result, and parameters may want gradients that nobody asks for.
    """
    return len({v.dtype for v in values}) == 1 and not values[-1].requires_grad


def _is_distributed(value: Any) -> bool:
    """Say whether a value is a `DTensor`, without importing what defines it."""
    return "torch.distributed.tensor" in sys.modules and isinstance(value, _tensors().DTensor)


def _tensors() -> Any:
    return sys.modules["torch.distributed.tensor"]


def _is_even(tensor: Any) -> bool:
    """Say whether all processes have parts of one shape, which `DTensor.from_local` expects."""
    over = [1] * tensor.dim()
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        if placement.is_shard():
            over[placement.dim] *= size
    with torch.no_grad():
        local = tensor.to_local()
    return all(
        statically_known_true(size * times == whole)
        for size, times, whole in zip(local.shape, over, tensor.shape, strict=True)
    )


def _divisor(out: Any, x: Any, weight: Any, bias: Any = None) -> int | None:
    """Return over how many processes the products of parts are summed; None where the product of
    parts is not a part of the product.
    """
    shard, replicate, partial = (
        getattr(_tensors(), name) for name in ("Shard", "Replicate", "Partial")
    )
    last = x.dim() - 1
    # Placements of x, the weight, the bias and the result, along one dimension of the mesh.
    alike = {
        (replicate(), shard(0)): (shard(0), shard(last)),
        (shard(last), shard(1)): (replicate(), partial()),
        (replicate(), replicate()): (replicate(), replicate()),
        **{(shard(axis), replicate()): (replicate(), shard(axis)) for axis in range(last)},
    }
    of_bias = [None] * out.device_mesh.ndim if bias is None else bias.placements
    divisor = 1
    for size, *given, added, made in zip(
        out.device_mesh.shape, x.placements, weight.placements, of_bias, out.placements,
        strict=True,
    ):  # fmt: skip
        expected = alike.get(tuple(given))
        if expected is None or made != expected[1] or added not in (None, expected[0]):
            return None
        if made == partial():
            divisor *= int(size)
    return divisor


def _replace(graph: fx.Graph, node: fx.Node, operands: Sequence[fx.Node], divisor: int) -> None:
    with graph.inserting_before(node):
        parts = [_part(node, operand) for operand in operands]
        if divisor > 1 and len(parts) > 2:
            parts[2] = add_call(node, torch.div, parts[2], divisor)
        local = add_call(node, torch.nn.functional.linear, *parts)
        placements = tuple(dynamo.value(node).placements)
        result = add_call(node, Distribute(placements), local, operands[0])
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _part(of: fx.Node, tensor: fx.Node) -> fx.Node:
    """Return the node of this process's part: where a `DTensor` was just made of it, that one."""
    if tensor.target is _tensors().DTensor.from_local and not tensor.kwargs.get("run_check"):
        given = tensor.args[0]
        if isinstance(given, fx.Node) and isinstance(dynamo.value(given), torch.Tensor):
            return given
    return add_method(of, "to_local", tensor)
