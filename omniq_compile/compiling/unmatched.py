"""Warns of layer patterns that name nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.layer_names import layer_name, possible_names
from omniq_compile.passes.patterns import matches, unmatched

logger = logging.getLogger("omniq")


def warn_unmatched(
    config: QuantConfig, layers: Sequence[str], nothing: str, elsewhere: Sequence[str] = ()
) -> None:
    """Log each layer pattern that names none of the layers, with the nearest names.

    Args:
        config: its options that name layers are looked at.
        layers: the names there are.
        nothing: how to say what a pattern matches then, such as "no layer of the model".
        elsewhere: names that are in another graph, of which a pattern may name one instead.
    """
    for option, patterns in config.layer_patterns.items():
        for pattern, close in unmatched(patterns, layers).items():
            if any(matches(pattern, layer) for layer in elsewhere):
                continue
            near = ", ".join(close or layers[:3])
            logger.warning("%s pattern %r matches %s; nearest: %s", option, pattern, nothing, near)


def warn_unmatched_in(model: nn.Module, config: QuantConfig) -> None:
    """Log the layer patterns that name no layer of a model, with the nearest names.

    A module that holds others may multiply too, so a pattern may well name it alone. But a regular
    expression that ends there is more often meant for the layers inside, and is reported where
    products of activations are kept anyway.
    """
    names = [name for _, name in possible_names(model)]
    warn_unmatched(config, names, "no layer of the model")
    if config.matmul:
        return
    # A layer that an adapter wraps has the name of what wraps it.
    parameters = model.named_parameters(remove_duplicate=False)
    layers = {layer_name([name], "") for name, _ in parameters}
    outer = {
        layer_name([], name)
        for name, module in model.named_modules(remove_duplicate=False)
        if next(module.children(), None) is not None
    } - layers
    for option, patterns in config.layer_patterns.items():
        for pattern in patterns:
            named = [name for name in names if name and matches(pattern, name)]
            if named and outer.issuperset(named):
                logger.warning(
                    "%s pattern %r names %s, and none of the layers in it; %r names them too",
                    option,
                    pattern,
                    named[0],
                    rf"re:({pattern.removeprefix('re:')})(\..*)?",
                )
