"""The two pictures of a comparison: a contact sheet, and the distance of the trajectories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omniq_compile.quality.generation import Pictures
from omniq_compile.quality.metrics import need

BLUE = "#2a6f97"

# Factors that a reader can do sums with.
FACTORS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Row(NamedTuple):
    """One picture of a contact sheet: ``[H, W, C]`` both ways, and what is written beside it."""

    label: str
    bf16: Pictures
    quantized: Pictures


def amplification(rows: Sequence[Row]) -> int:
    """Choose the largest factor that leaves 99% of all differences within the picture's range."""
    differences = np.concatenate([np.abs(r.bf16 - r.quantized).ravel() for r in rows])
    finite = differences[np.isfinite(differences)]
    large = float(np.quantile(finite, 0.99)) if finite.size else 0.0
    return max((f for f in FACTORS if f * large <= 1), default=1)


def contact_sheet(file: Path, rows: Sequence[Row], method: str, title: str) -> int:
    """Save each picture in BF16, quantized, and their amplified difference, side by side.

    Returns:
        The factor of the differences, which stands above them too.
    """
    plt = pyplot()
    factor = amplification(rows)
    height, width = rows[0].bf16.shape[:2]
    # Wide pictures take a line each; narrow ones share it, so that the sheet stays near square.
    across = min(len(rows), math.ceil((len(rows) * height / (2.5 * width)) ** 0.5))
    lines = -(-len(rows) // across)
    side = 1.55 if len(rows) > 6 else 2.2
    size = (across * (3 * side * width / max(height, width) + 0.6),
            lines * (side * height / max(height, width) + 0.45) + 0.5)  # fmt: skip
    figure = plt.figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    groups = figure.subfigures(lines, across, squeeze=False, wspace=0.1).ravel()
    for place, (group, row) in enumerate(zip(groups, rows, strict=False)):
        heads = ("BF16", method, f"|difference| x {factor}")
        panels = (row.bf16, row.quantized, np.abs(row.bf16 - row.quantized) * factor)
        group.supxlabel(row.label, fontsize=8, color="0.25")
        for axis, head, panel in zip(group.subplots(1, 3), heads, panels, strict=True):
            _show(axis, panel)
            # An empty head takes a head's room, so that all pictures are of one size.
            axis.set_title(head if place < across else " ", fontsize=9)
    save_figure(figure, file)
    return factor


def _show(axis: Any, picture: Pictures) -> None:
    shown = np.nan_to_num(np.clip(picture, 0, 1))
    height, width = shown.shape[:2]
    if shown.shape[-1] == 1:
        shown = shown[..., 0]
    # Every pixel of a small picture is to be seen, and a large one is not to shimmer.
    how = "nearest" if max(height, width) < 128 else "antialiased"
    axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation=how)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set(color="0.8", linewidth=0.6)


def trajectory_plot(file: Path, trajectories: dict[int, list[float]], title: str) -> None:
    """Save the relative L2 distance of the latents after each step, a line a seed."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for line in trajectories.values():
        axis.plot(range(1, len(line) + 1), line, color=BLUE, alpha=0.35, linewidth=1)
    longest = max(map(len, trajectories.values()))
    whole = [line for line in trajectories.values() if len(line) == longest]
    label = f"mean of {len(whole)} seeds" if len(whole) > 1 else f"seed {next(iter(trajectories))}"
    mean = np.mean(whole, axis=0)
    steps = range(1, longest + 1)
    axis.plot(steps, mean, color=BLUE, linewidth=2.2, marker="o", markersize=4, label=label)
    if len(whole) > 1:
        axis.plot([], [], color=BLUE, alpha=0.35, linewidth=1, label="one seed")
    if any(x > 0 for line in trajectories.values() for x in line):
        axis.set_yscale("log")
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("denoising step")
    axis.set_ylabel("latents: relative L2 distance to BF16")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25, which="both", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    save_figure(figure, file)


def pyplot() -> Any:
    """Return matplotlib's pyplot, which draws into files."""
    need("matplotlib").use("Agg")
    return need("matplotlib.pyplot")


def save_figure(figure: Any, file: Path) -> None:
    """Save a figure, and forget it."""
    figure.savefig(file, dpi=130, facecolor="white")
    pyplot().close(figure)
