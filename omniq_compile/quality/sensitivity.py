"""How much each layer's quantization alone moves a model's outputs on recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omniq_compile.quality.layer_units import Layer

# Measures a group of layers quantized at once: its name, and the layers.
Measure = Callable[[str, Sequence[Layer]], float]


def layer_errors(layers: Sequence[Layer], measure: Measure, most: int) -> dict[str, float]:
    """Return each layer's squared relative error, by its key.

    Up to ``most`` layers are measured one by one. Of larger models first each kind (over all
    blocks) and each block (all its layers) is. A kind's error is then shared out among the blocks
    in proportion to theirs, and what measurements are left go to the layers of the largest
    estimates for a byte, which is where a single bad layer shows.
    """
    if len(layers) <= most:
        return {layer.key: measure(f"layer {layer.key}", [layer]) for layer in layers}
    by_kind: dict[str, list[Layer]] = {}
    by_block: dict[str, list[Layer]] = {}
    for layer in layers:
        by_kind.setdefault(f"{layer.component}.{layer.kind}", []).append(layer)
        if layer.block:
            by_block.setdefault(f"{layer.component}.{layer.block}", []).append(layer)
    kinds = {name: measure(f"kind {name}", members) for name, members in by_kind.items()}
    blocks = {name: measure(f"block {name}", members) for name, members in by_block.items()}
    total: dict[tuple[str, str], float] = {}
    for name, members in by_block.items():
        family = (members[0].component, members[0].block_class)
        total[family] = total.get(family, 0.0) + blocks[name]
    errors: dict[str, float] = {}
    for layer in layers:
        kind = kinds[f"{layer.component}.{layer.kind}"]
        if not layer.block:
            errors[layer.key] = kind
            continue
        whole = total[layer.component, layer.block_class]
        share = blocks[f"{layer.component}.{layer.block}"] / whole if whole else 0.0
        errors[layer.key] = kind * share
    promising = sorted(
        (layer for layer in layers if layer.block),
        key=lambda layer: -errors[layer.key] / max(1, layer.extra_bytes),
    )
    for layer in promising[: max(0, most - len(kinds) - len(blocks))]:
        errors[layer.key] = measure(f"layer {layer.key}", [layer])
    return errors
