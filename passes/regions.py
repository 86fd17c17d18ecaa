"""Finds a model's repeated blocks from names and classes, whatever they are called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from torch import nn

# They and what derives from them, such as a linear that computes its own adapter.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class Link(NamedTuple):
    """A module that others are in.

    Attributes:
        name: dotted.
        kind: its class.
        is_layer: whether that is a class of layers, whatever such a module holds.
    """

    name: str
    kind: str
    is_layer: bool = False


# The modules around a layer, outermost first, the model itself and the layer left out.
Chain = Sequence[Link]


def link_to(name: str, kind: Any) -> Link:
    """Return the link for a module of a class, which Dynamo may have as text."""
    is_layer = isinstance(kind, type) and issubclass(kind, LAYERS)
    return Link(name, getattr(kind, "__name__", str(kind)), is_layer)


def find_blocks(chains: Iterable[Chain], weights: Iterable[str] = ()) -> dict[Chain, str]:
    """Return the block that each layer is in, for those that are in one.

    A block is the outermost numbered module (``blocks.3``) of a block class; a block class is one
    that some container holds at least twice. Blocks inside blocks are part of the outer one, and
    a numbered module of another class (``net.0`` of a feed-forward) is none, nor is a layer, which
    with an adapter holds others.

    Args:
        chains: of each layer.
        weights: dotted names of parameters, which show adapters too.
    """
    chains = [tuple(chain) for chain in chains]
    outer = dict(zip(chains, outside_layers(chains, weights), strict=True))
    classes = block_classes(outer.values())
    found = {chain: block_of(around, classes) for chain, around in outer.items()}
    return {chain: block[0] for chain, block in found.items() if block is not None}


def outside_layers(chains: Iterable[Chain], weights: Iterable[str] = ()) -> list[Chain]:
    """Return each chain up to the first layer in it, which with an adapter holds others.

    Such a layer is of a class of layers, or wraps one: peft calls it ``base_layer``, and who writes
    a wrapper by hand has names that begin with ``lora_`` beside the one layer. A block has more
    than one beside those of an adapter of its own.
    """
    chains = list(chains)
    links = {link for chain in chains for link in chain}
    inside = defaultdict(set)
    for name in {*weights, *(link.name for link in links)}:
        parts = name.split(".")
        for at, part in enumerate(parts):
            inside[".".join(parts[:at])].add(part)
    modules = {link.name for link in links} | inside.keys()
    layers = {link.name for link in links if link.is_layer}
    for name, held in inside.items():
        adapters = {part for part in held if part.startswith("lora_")}
        others = [part for part in held - adapters if f"{name}.{part}" in modules]
        if "base_layer" in held or (adapters and len(others) <= 1):
            layers.add(name)
    return [tuple(takewhile(lambda link: link.name not in layers, chain)) for chain in chains]


def with_containers(chain: Chain) -> Chain:
    """Return a chain with the numbered modules that its names show and that were not called.

    A trace leaves them out, as the lists of attention and feed-forward that some models are made
    of. It does not show their class: those of one container count as one.
    """
    found: list[Link] = []
    for link in chain:
        above = f"{found[-1].name}." if found else ""
        parts = link.name.split(".")
        for name in (".".join(parts[:n]) for n in range(1, len(parts))):
            if _is_numbered(name) and name.startswith(above):
                found.append(Link(name, f"in {name.rpartition('.')[0]}"))
        found.append(link)
    return tuple(found)


def block_classes(chains: Iterable[Chain]) -> set[str]:
    """Return the classes of which some container holds at least two numbered modules."""
    families: dict[tuple[str, str], set[str]] = {}
    for link in (link for chain in chains for link in chain if _is_numbered(link.name)):
        families.setdefault((link.name.rpartition(".")[0], link.kind), set()).add(link.name)
    return {kind for (_, kind), names in families.items() if len(names) > 1}


def block_of(chain: Chain, classes: set[str]) -> tuple[str, str] | None:
    """Return the outermost module of a chain that is a block, as (dotted name, class)."""
    numbered = ((x.name, x.kind) for x in chain if _is_numbered(x.name) and x.kind in classes)
    return next(numbered, None)


def _is_numbered(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()
