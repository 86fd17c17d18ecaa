"""Names weights and layers as the model does, where Dynamo found them in another way.

A function that is handed two modules calls both by its own variables, and a plain object that
keeps layers of the model is a second way to them. Patterns in options are names of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from omniq_compile.passes import dynamo

# Of each input that is a parameter or buffer of the model, by the placeholder's name.
WeightNames = Mapping[str, Sequence[str]]


def name_as_in_model(gm: fx.GraphModule, names: WeightNames) -> fx.GraphModule:
    """Give weights, and the modules around them, the names that they have in the model.

    Args:
        gm: changed in place.
        names: those that the model has for each weight, of which Dynamo's own is left as it is.
    """
    moved: dict[dynamo.Path, dynamo.Path] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        found = dynamo.weight_path(node)
        known = [dynamo.names_in(name) for name in names.get(node.name, ())]
        if not known or not found or found[1:] in known:
            continue
        name = max(known, key=lambda name: _equal_at_end(found, name))
        dynamo.set_weight_name(node, ".".join(name))
        same = _equal_at_end(found[:-1], name[:-1])
        moved[found[: len(found) - 1 - same]] = name[: len(name) - 1 - same]
    if moved:
        for node in gm.graph.nodes:
            dynamo.move_places(node, moved)
    return gm


def _equal_at_end(found: dynamo.Path, name: dynamo.Path) -> int:
    """Count the last parts of two paths that are equal; the first of ``found`` is a variable."""
    count = 0
    while count < min(len(found) - 1, len(name)) and found[-1 - count] == name[-1 - count]:
        count += 1
    return count
