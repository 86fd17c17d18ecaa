"""Which modules of a repeated block are compiled: the block, or what can be called in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from omniq_compile.passes.config import QuantConfig


def compiled_parts(
    blocks: Mapping[str, nn.Module], config: QuantConfig
) -> dict[str, dict[str, nn.Module]]:
    """Return what is compiled of each block, by name, for those of which something is.

    That is the block itself, or of one that only holds others the outermost that can be called. A
    module in several blocks is a part of the first.

    Args:
        blocks: of a model, by name.
        config: where it quantizes no products of activations, parts without parameters run as they
            are.
    """
    found: dict[str, dict[str, nn.Module]] = {}
    seen: set[nn.Module] = set()
    for name, block in blocks.items():
        for part_name, part in _outermost_called(name, block):
            multiplies = config.matmul or next(part.parameters(), None) is not None
            if multiplies and part not in seen:
                seen.add(part)
                found.setdefault(name, {})[part_name] = part
    return found


def holds_wide_linear(part: nn.Module, config: QuantConfig) -> bool:
    """Say whether a module has a linear layer that is wide enough to be quantized."""
    linears = (module for module in part.modules() if isinstance(module, nn.Linear))
    return any(min(m.in_features, m.out_features) >= config.min_features for m in linears)


def _outermost_called(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if _can_be_called(module):
        yield name, module
        return
    for own, child in module.named_children():
        yield from _outermost_called(f"{name}.{own}", child)


def _can_be_called(module: nn.Module) -> bool:
    # accelerate gives every module a `forward` of its own, which calls the one from before.
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    if own is None:
        return type(module).forward is not nn.Module.forward
    return getattr(own, "__func__", own) is not nn.Module.forward
