"""``omniq compare``: a pipeline in BF16 and quantized, measured, drawn and judged.

Exit code 0: the gate is passed; 1: it is not; 2: something went wrong before that was known.
"""

from __future__ import annotations

import argparse
import dataclasses
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from omniq_compile.cli.pipeline_arguments import (
    add_call_arguments,
    add_quality_arguments,
    quality_setting,
)
from omniq_compile.cli.quantization import add_quantization_argument, read_quantization
from omniq_compile.lowering.errors import OmniqError, OptionError
from omniq_compile.quality.gate import EQUAL, GATES, Gate

MOST_ROWS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", help="a diffusers pipeline, or a hub id")
    add_quantization_argument(parser)
    add_call_arguments(parser)
    parser.add_argument(
        "--ignored-layers",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="layers to keep, such as img_mlp",
    )
    add_quality_arguments(parser, seeds="0-7")
    parser.add_argument("--out", required=True, type=Path, help="the folder for what is found")
    parser.add_argument("--overwrite", action="store_true", help="replace a result in --out")
    parser.add_argument(
        "--gate",
        choices=list(GATES),
        default="smoke",
        help="thresholds: "
        + "; ".join(
            f"{name}: PSNR {g.psnr:g} dB, cosine {g.cosine:g}, relative L2 {g.relative_l2:g}"
            for name, g in GATES.items()
        ),
    )
    parser.add_argument("--min-psnr", type=float, metavar="DB", help="in place of the gate's")
    parser.add_argument("--min-cosine", type=float, metavar="X", help="in place of the gate's")
    parser.add_argument("--max-relative-l2", type=float, metavar="X", help="in place of the gate's")


def run(arguments: argparse.Namespace) -> int:
    """Compare, save and judge; returns the exit code."""
    from diffusers.utils import logging

    logging.disable_progress_bar()  # they would break into ours
    try:
        return _run(arguments)
    except OmniqError:
        raise
    except Exception:
        # Python would exit with 1, which says that the gate was not passed.
        traceback.print_exc()
        return 2


def _run(arguments: argparse.Namespace) -> int:
    from omniq_compile.quality.compare_result import as_json, write_json
    from omniq_compile.quality.comparison import compare
    from omniq_compile.quality.metrics import need
    from omniq_compile.quality.output_folder import make_folder, work_folder

    need("skimage.metrics")
    need("matplotlib")
    gate = _gate(arguments)
    setting = quality_setting(
        arguments, read_quantization(arguments.quantization), arguments.ignored_layers
    )
    if (arguments.out / "result.json").exists() and not arguments.overwrite:
        raise OptionError(
            f"--out {arguments.out} holds the result of an earlier comparison. Choose another "
            "folder, or replace it with --overwrite."
        )
    made = not arguments.out.exists()
    out = make_folder(arguments.out)
    console = Console(stderr=True)
    try:
        with work_folder(out) as work:
            with Progress(console=console, transient=True) as progress:
                bars = _Bars(progress, len(setting.seeds), arguments.steps)
                result = compare(setting, work, bars)
            failures = gate.failures(result.seeds)
            content = as_json(setting, result, gate, arguments.gate, failures)
            _draw(out, work, result, content, _name_of(setting.config))
            write_json(out / "result.json", content)  # last: it says that all of it is there
    finally:
        if made:
            with suppress(OSError):  # something is in it
                out.rmdir()
    _print(console, content, out)
    return 1 if failures else 0


def _gate(arguments: argparse.Namespace) -> Gate:
    changed = {
        "psnr": arguments.min_psnr,
        "cosine": arguments.min_cosine,
        "relative_l2": arguments.max_relative_l2,
    }
    gate = dataclasses.replace(
        GATES[arguments.gate], **{k: v for k, v in changed.items() if v is not None}
    )
    for name in gate.unmet(EQUAL):
        raise OptionError(
            f"the threshold for {name} is {getattr(gate, name):g}, which nothing passes: that of "
            f"equal pictures is {EQUAL[name]:g}."
        )
    return gate


def _name_of(config: Any) -> str:
    given = [config.everywhere] if config.everywhere else config.components.values()
    return " + ".join(dict.fromkeys(o["method"] for o in given if o)) or "BF16"


class _Bars:
    """A bar for each side, advanced by denoising steps."""

    def __init__(self, progress: Progress, seeds: int, steps: int | None) -> None:
        self._progress = progress
        # Until the first call is over, the pipeline's own number of steps is not known.
        self._steps = steps or 0
        self._seeds = seeds
        self._bars = {n: progress.add_task(n, total=None) for n in ("bf16", "quantized")}

    def __call__(self, side: str, place: int, done: int) -> None:
        if done < 0:
            self._steps = max(self._steps, 1)
            done = self._steps
        elif done > self._steps:
            self._steps = done
        self._progress.update(
            self._bars[side], completed=place * self._steps + done, total=self._seeds * self._steps
        )


def _draw(out: Path, work: Path, result: Any, content: dict[str, Any], method: str) -> None:
    """Save the contact sheet, of the worst pictures where there are many, and the plot."""
    from omniq_compile.quality.compare_figures import Row, contact_sheet, trajectory_plot
    from omniq_compile.quality.comparison import pictures_in

    # Of a result that is replaced; it would describe pictures that are no longer there.
    for name in ("result.json", "trajectory.png"):
        (out / name).unlink(missing_ok=True)
    places = [(row["seed"], p["index"], p) for row in result.seeds for p in row["pictures"]]
    # A picture that is not finite differs most.
    chosen = sorted(places, key=lambda p: np.nan_to_num(p[2]["psnr"], nan=-np.inf))[:MOST_ROWS]
    chosen.sort(key=lambda p: (p[0], p[1]))
    rows = []
    for seed, index, about in chosen:
        pair = [pictures_in(work, side, seed)[index] for side in ("bf16", "quantized")]
        rows.append(Row(f"seed {seed}, picture {index}: {about['psnr']:.1f} dB", *pair))
    which = f"all {len(rows)} pictures"
    if len(rows) < len(places):
        which = f"the {len(rows)} of {len(places)} pictures that differ most"
    content["contact_sheet"] = {
        "file": "contact_sheet.png",
        "amplification": contact_sheet(
            out / "contact_sheet.png", rows, method, f"{method} beside BF16, same seeds: {which}"
        ),
        "pictures": [[seed, index] for seed, index, _ in chosen],
    }
    trajectories = {r["seed"]: r["trajectory"] for r in result.seeds if r["trajectory"]}
    if trajectories:
        trajectory_plot(out / "trajectory.png", trajectories, f"{method}: drift of the latents")
        content["trajectory_plot"] = "trajectory.png"


def _print(console: Console, content: dict[str, Any], out: Path) -> None:
    count = len(content["seeds"])
    seeds = f"{count} seeds, each" if count > 1 else "1 seed,"
    table = Table(title=f"{seeds} over all its pictures")
    for column in ("", "mean", "worst seed"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in content["metrics"].items():
        if value["mean"] is None:
            table.add_row(name, "not measured", escape(content["not_measured"][name]))
        else:
            table.add_row(name, f"{value['mean']:.4f}", f"{value['worst']:.4f}")
    for name, key in (("BF16", "bf16"), ("quantized", "quantized")):
        side = content[key]
        peak = "unknown" if side["peak_bytes"] is None else f"{side['peak_bytes'] / 1e6:,.0f} MB"
        table.add_row(
            name, f"{side['median_seconds']:.2f} s a call", f"peak {peak}, weights "
            f"{side['weight_bytes'] / 1e6:,.1f} MB",
        )  # fmt: skip
    console.print(table)
    gate = content["gate"]
    for line in gate["failures"]:
        console.print(f"[red]{line}")
    console.print(
        f"gate {gate['name']}: {'passed' if gate['passed'] else 'FAILED'}; wrote {out}",
        soft_wrap=True,
        markup=False,
    )
