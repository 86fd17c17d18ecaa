"""The layers that can be kept in BF16, with what each costs, ordered by the model's own structure.

A layer's *kind* is its name with its block's number left out (``transformer_blocks.*.attn.to_q``),
for blocks found by their repeated class. Nothing here knows a name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from omniq_compile.layer_plan import plan_layers
from omniq_compile.model_blocks import module_blocks
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.patterns import matches


@dataclass(frozen=True)
class Layer:
    """A layer that the options quantize.

    Attributes:
        component: of the pipeline.
        name: dotted, in its component.
        block: the repeated block it is in, or "".
        block_class: the class of that block, or "".
        extra_bytes: what keeping it takes beyond its quantized form; of layers that share a weight
            the first has it.
    """

    component: str
    name: str
    block: str
    block_class: str
    extra_bytes: int

    @property
    def key(self) -> str:
        """Its name in the pipeline."""
        return f"{self.component}.{self.name}"

    @property
    def kind(self) -> str:
        """Its name, the same in every block of a container."""
        if not self.block:
            return self.name
        return f"{self.block.rpartition('.')[0]}.*{self.name.removeprefix(self.block)}"


def quantized_layers(component: str, model: nn.Module, config: QuantConfig) -> list[Layer]:
    """Return the layers that the options quantize, in the model's order."""
    blocks = module_blocks(model)
    found = []
    seen = set()
    for row in plan_layers(model, config):
        if row.method is None:
            continue
        block = next((b for b in blocks if row.layer.startswith(f"{b}.")), "")
        kind = type(blocks[block]).__name__ if block else ""
        weight = id(model.get_submodule(row.layer).weight)
        saved = 0 if weight in seen else row.nbytes_before - row.nbytes_after
        seen.add(weight)
        found.append(Layer(component, row.layer, block, kind, saved))
    return found


def count_policies(layers: Sequence[Layer], kept: Collection[str]) -> int:
    """Return how often the most varied block class would be compiled: once for each policy."""
    by_block: dict[tuple[str, str, str], set[str]] = {}
    for layer in layers:
        if layer.block:
            place = (layer.component, layer.block_class, layer.block)
            inside = by_block.setdefault(place, set())
            if layer.key in kept:
                inside.add(layer.name.removeprefix(layer.block))
    policies: dict[tuple[str, str], set[frozenset[str]]] = {}
    for (component, block_class, _), inside in by_block.items():
        policies.setdefault((component, block_class), set()).add(frozenset(inside))
    return max((len(p) for p in policies.values()), default=0)


def as_patterns(layers: Sequence[Layer], kept: Collection[str]) -> list[str]:
    """Return the shortest ``ignored_layers`` found that name the kept layers and no others.

    Whole blocks and whole kinds become one pattern; the rest are full names.

    Args:
        layers: of one component.
        kept: keys, of other components too.
    """
    left = {layer.name for layer in layers if layer.key in kept}
    wanted = set(left)
    groups: dict[str, set[str]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, set()).add(layer.name)
        if layer.block:
            groups.setdefault(layer.block, set()).add(layer.name)
    names = [layer.name for layer in layers]
    patterns = []
    for pattern, members in sorted(groups.items(), key=lambda g: -len(g[1])):
        if len(members & left) < 2 or not members <= wanted:
            continue
        if {n for n in names if matches(pattern, n)} == members:
            patterns.append(pattern)
            left -= members
    return sorted(patterns) + [_exact(n, names) for n in names if n in left]


def _exact(name: str, names: Iterable[str]) -> str:
    # A name can be a run of parts of another one.
    if sum(matches(name, other) for other in names) == 1:
        return name
    return f"re:{re.escape(name)}"


def path_of_keeping(
    layers: Sequence[Layer], errors: Mapping[str, float], most_policies: int
) -> list[frozenset[str]]:
    """Return ever larger sets of kept layers: each adds what takes the most error off for a byte.

    A step keeps one layer. Where that would give a block class more than ``most_policies``
    policies, it keeps a kind in all blocks, or a whole block, which at last always fits.

    Args:
        layers: see `quantized_layers`.
        errors: what quantizing each layer alone adds, additive: squared, not its root.
        most_policies: see `count_policies`.

    Returns:
        From nothing kept to everything kept.
    """
    groups: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        groups.setdefault(("layer", layer.key), []).append(layer)
        groups.setdefault(("kind", layer.component, layer.kind), []).append(layer)
        if layer.block:
            groups.setdefault(("block", layer.component, layer.block), []).append(layer)
    kept: frozenset[str] = frozenset()
    path = [kept]
    while len(kept) < len(layers):
        moves = []
        for place, members in enumerate(groups.values()):
            new = frozenset(m.key for m in members) - kept
            if new:
                cost = max(1, sum(m.extra_bytes for m in members if m.key in new))
                moves.append((-sum(errors[key] for key in new) / cost, place, new))
        moves.sort(key=lambda move: move[:2])
        fitting = (m[2] for m in moves if count_policies(layers, kept | m[2]) <= most_policies)
        # Together with everything there is one policy again.
        kept |= next(fitting, frozenset(layer.key for layer in layers))
        path.append(kept)
    return path
