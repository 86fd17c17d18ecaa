"""Finds a model's repeated blocks from names and classes, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# The modules around a layer, outermost first, the model itself and the layer left out:
# (dotted name, class).
Chain = Sequence[tuple[str, str]]


def find_blocks(chains: Iterable[Chain]) -> dict[Chain, str]:
    """Return the block that each layer is in, for those that are in one.

    A block is the outermost numbered module with a sibling of its own class: ``blocks.3`` beside
    ``blocks.4``. Blocks inside blocks are part of the outer one, and a numbered module without
    such a sibling (``net.0`` of a feed-forward) is none.
    """
    chains = [tuple(chain) for chain in chains]
    families: dict[tuple[str, str], set[str]] = {}
    for chain in chains:
        for name, class_name in chain:
            container, _, number = name.rpartition(".")
            if number.isdigit():
                families.setdefault((container, class_name), set()).add(name)
    found = {}
    for chain in chains:
        for name, class_name in chain:
            if len(families.get((name.rpartition(".")[0], class_name), ())) > 1:
                found[chain] = name
                break
    return found
