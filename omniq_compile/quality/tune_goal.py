"""What `tune` is asked to reach, and whether it can be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omniq_compile.lowering.errors import OptionError
from omniq_compile.passes.config import QuantConfig
from omniq_compile.quality.comparison import Setting


@dataclass(frozen=True)
class Goal:
    """What is asked for: one of the two.

    Attributes:
        psnr: in dB, that every seed has to reach, with as few bytes as possible.
        max_bytes: of weights of the quantized components, with as high a PSNR as possible.
    """

    psnr: float | None = None
    max_bytes: int | None = None


def check_goal(setting: Setting, goal: Goal) -> None:
    """Check what is asked for before anything is loaded.

    Raises:
        OptionError: the PSNR is no positive number, or the options cannot be tuned.
    """
    if goal.psnr is not None and not (math.isfinite(goal.psnr) and goal.psnr > 0):
        raise OptionError(f"--target-psnr {goal.psnr:g} must be a positive number of decibels.")
    if any(QuantConfig.from_options(options).matmul for options in setting.config.chosen):
        raise OptionError(
            "'matmul' quantizes products that belong to no layer, so they cannot be tuned. "
            "Tune without it."
        )


def check_bytes(limit: int, all_quantized: int, bf16: int) -> None:
    """Check a number of bytes before anything is generated.

    Args:
        limit: that is asked for.
        all_quantized: the bytes of the weights when every layer is quantized.
        bf16: likewise, when none is.

    Raises:
        OptionError: the limit is not between the two, so that there is nothing to choose.
    """
    if all_quantized > limit:
        raise OptionError(
            f"--max-bytes {limit:,} cannot be met: with every layer quantized the weights "
            f"take {all_quantized:,} bytes."
        )
    if limit >= bf16:
        raise OptionError(
            f"--max-bytes {limit:,} leaves every layer in BF16: the weights take {bf16:,} bytes. "
            "Give fewer."
        )
