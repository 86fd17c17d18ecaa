"""Finds a model's repeated blocks from names and classes, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# The modules around a layer, outermost first, the model itself and the layer left out:
# (dotted name, class).
Chain = Sequence[tuple[str, str]]


def find_blocks(chains: Iterable[Chain]) -> dict[Chain, str]:
    """Return the block that each layer is in, for those that are in one.

    A block is the outermost numbered module (``blocks.3``) of a block class; a block class is one
    that some container holds at least twice. Blocks inside blocks are part of the outer one, and
    a numbered module of another class (``net.0`` of a feed-forward) is none.
    """
    chains = [tuple(chain) for chain in chains]
    classes = block_classes(chains)
    found = {chain: block_of(chain, classes) for chain in chains}
    return {chain: block[0] for chain, block in found.items() if block is not None}


def block_classes(chains: Iterable[Chain]) -> set[str]:
    """Return the classes of which some container holds at least two numbered modules."""
    families: dict[tuple[str, str], set[str]] = {}
    for link in (link for chain in chains for link in chain if _is_numbered(link[0])):
        families.setdefault((link[0].rpartition(".")[0], link[1]), set()).add(link[0])
    return {kind for (_, kind), names in families.items() if len(names) > 1}


def block_of(chain: Chain, classes: set[str]) -> tuple[str, str] | None:
    """Return the outermost module of a chain that is a block, as (dotted name, class)."""
    numbered = ((n, kind) for n, kind in chain if _is_numbered(n) and kind in classes)
    return next(numbered, None)


def _is_numbered(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()
