"""Traces a model with each kind of repeated block traced once: the sites of a whole trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from omniq_compile.passes import dynamo
from omniq_compile.passes.inline import inline
from omniq_compile.passes.match import find_sites
from omniq_compile.passes.regions import link_to
from omniq_compile.passes.sites import Site
from omniq_compile.planning.meta_run import BlockCall, MetaRun
from omniq_compile.reports.tracing import run_traced


def folded_sites(
    model: nn.Module, inputs: Mapping[str, Any], blocks: Mapping[str, nn.Module], run: MetaRun
) -> list[Site]:
    """Return the sites of a model on the meta device, undecided, in the order it runs them.

    They are those of a whole trace, with full names. A block that ran once stands for every block
    of its class that ran the same operators on the same shapes and layers; in the trace of the
    model itself, one call that returns the right shapes stands in for each of them. A block that
    was called more than once, or that returns more than tensors, is traced where it stands.

    Args:
        model, inputs: as given to `run_on_meta`.
        blocks: its repeated blocks by name.
        run: what `run_on_meta` saw.
    """
    calls = _foldable(run)
    traced: list[tuple[type, BlockCall, list[Site]]] = []
    inside = {}
    for name, call in calls.items():
        block = blocks[name]
        sites = next((s for k, c, s in traced if k is type(block) and _alike(c, call)), None)
        if sites is None:
            sites = _sites_of(block, call.args, call.kwargs)
            traced.append((type(block), call, sites))
        inside[name] = [_renamed(site, name, model) for site in sites]
    found = []
    with _stand_ins(model, calls):
        for gm in _graphs(model, (), inputs):
            by_node = {site.node: site for site in find_sites(gm)}
            for node in gm.graph.nodes:
                if node.target is stand_in:
                    found += inside[node.args[0]]
                elif node in by_node:
                    found.append(by_node[node])
    return found


def stand_in(name: str, sizes: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return tensors as the block ``name`` does: sizes are (shape, dtype) each."""
    return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in sizes)


torch.compiler.allow_in_graph(stand_in)


class _StandIn(nn.Module):
    def __init__(self, name: str, call: BlockCall) -> None:
        super().__init__()
        leaves, self._structure = tree_flatten(call.output)
        self._is_tensor = isinstance(call.output, torch.Tensor)
        self._is_tuple = type(call.output) is tuple and all(map(torch.is_tensor, call.output))
        self._name = name
        self._sizes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Without the functions of pytrees, which take Dynamo longer than all else in a model.
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        outputs = stand_in(self._name, self._sizes, *tensors)
        if self._is_tuple:
            return outputs
        return outputs[0] if self._is_tensor else tree_unflatten(outputs, self._structure)


def _foldable(run: MetaRun) -> dict[str, BlockCall]:
    names = [name for name, _ in run.calls]
    return {
        name: call
        for name, call in run.calls
        if names.count(name) == 1
        and all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(call.output))
    }


def _alike(one: BlockCall, other: BlockCall) -> bool:
    return one.operations == other.operations


def _sites_of(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Site]:
    return [site for gm in _graphs(block, args, kwargs) for site in find_sites(gm)]


def _graphs(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[fx.GraphModule]:
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(inline(dynamo.copy_graph(gm)))
        return gm.forward

    run_traced(module, args, kwargs, record)
    return graphs


def _renamed(site: Site, block: str, model: nn.Module) -> Site:
    """Name a block's site as the whole model does."""
    parts = block.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    around = [link_to(name, type(model.get_submodule(name))) for name in above]
    around += [link._replace(name=_join(block, link.name)) for link in site.around]
    return dataclasses.replace(
        site,
        layer=site.layer_in(block),
        weight_names=tuple(_join(block, name) for name in site.weight_names if name),
        around=tuple(around),
    )


def _join(block: str, name: str) -> str:
    return f"{block}.{name}" if name else block


@contextmanager
def _stand_ins(model: nn.Module, calls: Mapping[str, BlockCall]) -> Iterator[None]:
    """Put stand-ins in the places of blocks, and the blocks back afterwards."""
    replaced = {name: model.get_submodule(name) for name in calls}
    try:
        for name, call in calls.items():
            model.set_submodule(name, _StandIn(name, call))
        yield
    finally:
        for name, block in replaced.items():
            model.set_submodule(name, block)
