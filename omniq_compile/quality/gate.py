"""Pass or fail: thresholds on the pictures of each seed.

The numbers come from vLLM-Omni's ``compare_diffusion_trajectory_similarity.py``, which judges all
images or frames of a request together. ``smoke`` is what it recommends at the least; ``strict`` has
its strict cosine and relative L2, beside 25 dB, from which on it calls pictures close.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gate:
    """What the pictures of every seed have to reach, all of them taken together.

    Attributes:
        psnr: least, in dB.
        cosine: least.
        relative_l2: greatest.
    """

    psnr: float
    cosine: float
    relative_l2: float

    def failures(self, seeds: Sequence[Mapping[str, Any]]) -> list[str]:
        """Say what fails, a line each; a number that is missing or NaN fails.

        Args:
            seeds: of each seed, ``seed`` and the metrics of its pictures.
        """
        return [_line(row, name, getattr(self, name)) for row in seeds for name in self.unmet(row)]

    def unmet(self, row: Mapping[str, Any]) -> list[str]:
        """Name the metrics of one seed that fail; one that is NaN does, and any does at a NaN."""
        reached = {name: row[name] >= getattr(self, name) for name in ("psnr", "cosine")}
        reached["relative_l2"] = row["relative_l2"] <= self.relative_l2
        return [name for name, is_reached in reached.items() if not is_reached]


def _line(row: Mapping[str, Any], name: str, limit: float) -> str:
    value = row[name]
    where = "not" if math.isnan(value) else "over" if name == "relative_l2" else "under"
    return f"seed {row['seed']}: {name} {value:.4g} is {where} {limit:g}"


# What the metrics of two equal pictures are.
EQUAL = {"psnr": math.inf, "cosine": 1.0, "relative_l2": 0.0}

GATES = {"smoke": Gate(20.0, 0.98, 0.20), "strict": Gate(25.0, 0.995, 0.08)}
