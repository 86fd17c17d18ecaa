"""Quality against bytes: what was tried, and what was found."""

from __future__ import annotations

import math
from pathlib import Path

from omniq_compile.quality.compare_figures import BLUE, pyplot, save_figure
from omniq_compile.quality.tune_goal import Goal
from omniq_compile.quality.tuning import Tuned

RED = "#c1121f"


def quality_plot(file: Path, found: Tuned, goal: Goal, title: str) -> None:
    """Save the lowest PSNR of the seeds over the bytes of weights, a dot for each generated set."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    unit = 1e9 if found.nbytes_bf16 >= 2e9 else 1e6
    best: list[tuple[int, float]] = []
    for nbytes, quality in (p for p in found.points if math.isfinite(p[1])):
        if not best or quality > best[-1][1]:
            best.append((nbytes, quality))
    others = [p for p in found.points if p not in best and math.isfinite(p[1])]
    axis.plot(
        [x / unit for x, _ in best], [y for _, y in best], color=BLUE, marker="o", markersize=4,
        linewidth=1.6, label="best for its bytes",
    )  # fmt: skip
    if others:
        xs, ys = zip(*others, strict=True)
        axis.scatter([x / unit for x in xs], ys, s=14, color="0.6", label="also tried", zorder=1)
    chosen = min(found.seed_psnr)
    if math.isfinite(chosen):
        axis.scatter(
            [found.nbytes / unit], [chosen], marker="*", s=190, color=RED, zorder=5,
            label=f"found: {len(found.kept)} of {len(found.layers)} layers kept, {chosen:.1f} dB",
        )  # fmt: skip
    if goal.psnr is not None:
        axis.axhline(goal.psnr, color=RED, linewidth=1, linestyle="--")
        axis.annotate(
            f"asked for: {goal.psnr:g} dB", (1, goal.psnr), xycoords=("axes fraction", "data"),
            xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=8, color=RED,
        )  # fmt: skip
    else:
        assert goal.max_bytes is not None
        axis.axvline(goal.max_bytes / unit, color=RED, linewidth=1, linestyle="--")
    for name, nbytes in (
        ("all quantized", found.nbytes_all_quantized),
        ("all BF16", found.nbytes_bf16),
    ):
        axis.axvline(nbytes / unit, color="0.75", linewidth=1, zorder=0)
        axis.annotate(
            name, (nbytes / unit, 0.02), xycoords=("data", "axes fraction"), rotation=90,
            xytext=(3, 0), textcoords="offset points", fontsize=8, color="0.45",
        )  # fmt: skip
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(f"weights of the quantized components, {'GB' if unit == 1e9 else 'MB'}")
    axis.set_ylabel("PSNR to BF16 of the worst seed, dB")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="best")
    save_figure(figure, file)
