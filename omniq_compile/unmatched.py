"""Warns of layer patterns that name nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.patterns import unmatched

logger = logging.getLogger("omniq")


def warn_unmatched(config: QuantConfig, layers: Sequence[str], nothing: str) -> None:
    """Log each layer pattern that names none of the layers, with the nearest names.

    Args:
        config: its options that name layers are looked at.
        layers: the names there are.
        nothing: how to say what a pattern matches then, such as "no layer of the model".
    """
    for option, patterns in config.layer_patterns.items():
        for pattern, close in unmatched(patterns, layers).items():
            near = ", ".join(close or layers[:3])
            logger.warning("%s pattern %r matches %s; nearest: %s", option, pattern, nothing, near)
