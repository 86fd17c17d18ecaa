"""How a layer is named, in the graph that it is traced in and in a model around that."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def layer_name(weights: Sequence[str], module: str, place: str = "") -> str:
    """Name a product by its weight, or else by the module that multiplies.

    Args:
        weights: dotted names of the parameters and buffers that its weight is made of.
        module: the innermost one that the product was traced in; "" is the outermost.
        place: where a model has the outermost module; "" names the layer as the graph does.
    """
    if len(weights) == 1:
        return _join(place, weights[0]).removesuffix(".weight")
    return _join(place, module)


def possible_names(module: nn.Module, place: str = "") -> list[tuple[str, str]]:
    """Return the names that a product in a module may have, without tracing it.

    Args:
        module: which is compiled on its own.
        place: of the module in a model; "" is the model itself.

    Returns:
        (the name in the module, the name in the model) of each parameter, buffer and module, but
        for biases, which nothing is multiplied by.
    """
    tensors = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    tensors += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    modules = [name for name, _ in module.named_modules(remove_duplicate=False)]
    tensors = [name for name in tensors if name.rpartition(".")[2] != "bias"]
    names = [(layer_name([name], ""), layer_name([name], "", place)) for name in tensors]
    names += [(layer_name([], name), layer_name([], name, place)) for name in modules]
    return list(dict.fromkeys(names))


# What `torch.compile`, peft, and PyTorch's activation checkpoints and FSDP wrap a module in: a
# layer keeps its name when an adapter is loaded, and `state_dict` leaves the last two out too.
_WRAPPED = {"_orig_mod", "base_layer", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def _join(place: str, name: str) -> str:
    parts = f"{place}.{name}".split(".")
    return ".".join(part for part in parts if part and part not in _WRAPPED)
