"""The repeated blocks of a model, told by its modules alone."""

from __future__ import annotations

from torch import nn

from omniq_compile.passes.regions import find_blocks, link_to


def module_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks of a model by name, in the order they were registered."""
    modules = dict(model.named_modules())
    chains = []
    for name, module in modules.items():
        if name and next(module.parameters(recurse=False), None) is not None:
            parts = name.split(".")
            last = len(parts) if _multiplies_itself(module) else len(parts) - 1
            above = (".".join(parts[:n]) for n in range(1, last + 1))
            chains.append(tuple(link_to(path, type(modules[path])) for path in above))
    blocks = find_blocks(chains, (name for name, _ in model.named_parameters()))
    return {name: modules[name] for name in dict.fromkeys(blocks.values())}


def _multiplies_itself(module: nn.Module) -> bool:
    """Say whether a module seems to be more than a layer: it has matrices that are no layer's.

    ``weight`` is that of a layer, such as a linear or an embedding of the model's own; what has one
    wide axis is the gain of a norm.
    """
    if type(module).__module__.startswith("torch.nn."):
        return False
    own = module.named_parameters(recurse=False)
    return any(name != "weight" and sum(size > 1 for size in p.shape) > 1 for name, p in own)
