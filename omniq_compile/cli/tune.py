"""``omniq tune``: the smallest set of layers to keep in BF16 for a quality, or for a size."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from omniq_compile.cli.options import add_option_arguments, options_of
from omniq_compile.cli.pipeline_arguments import (
    add_call_arguments,
    add_quality_arguments,
    quality_setting,
)
from omniq_compile.cli.whole_numbers import positive
from omniq_compile.lowering.errors import OmniqError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", help="a diffusers pipeline, or a hub id")
    add_option_arguments(parser)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--target-psnr",
        type=float,
        metavar="DB",
        help="what the pictures of every seed have to reach, beside those of BF16",
    )
    goal.add_argument(
        "--max-bytes", type=positive, metavar="N", help="of the quantized components' weights"
    )
    add_call_arguments(parser)
    add_quality_arguments(parser, seeds="0-1")
    parser.add_argument("--out", required=True, type=Path, help="the folder for what is found")
    parser.add_argument("--restart", action="store_true", help="measure anew what is in --out")
    parser.add_argument(
        "--measurements",
        type=positive,
        default=400,
        metavar="N",
        help="layers measured one by one; of larger models kinds and blocks first (%(default)s)",
    )
    parser.add_argument(
        "--calls",
        type=positive,
        default=8,
        metavar="N",
        help="calls of a model, spread over its denoising, to measure a layer on (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Tune, print and save; returns the exit code."""
    from diffusers.utils import logging

    logging.disable_progress_bar()  # they would break into ours
    try:
        return _run(arguments)
    except OmniqError:
        raise
    except KeyboardInterrupt:
        if (arguments.out / "state.json").exists():
            print("what was measured is kept: the same command goes on from there", file=sys.stderr)
        raise
    except Exception:
        traceback.print_exc()
        return 2


def _run(arguments: argparse.Namespace) -> int:
    import torch

    import omniq_compile
    from omniq_compile.checkpoints.hub_download import hub_arguments
    from omniq_compile.pipelines.images import by_argument
    from omniq_compile.quality.compare_result import as_given, write_json
    from omniq_compile.quality.metrics import need
    from omniq_compile.quality.output_folder import make_folder, work_folder
    from omniq_compile.quality.tune_figure import quality_plot
    from omniq_compile.quality.tune_goal import Goal
    from omniq_compile.quality.tune_state import TuneState, fingerprint
    from omniq_compile.quality.tuning import tune

    need("skimage.metrics")
    need("matplotlib")
    setting = quality_setting(arguments, options_of(arguments))
    goal = Goal(arguments.target_psnr, arguments.max_bytes)
    out = make_folder(arguments.out)
    about = {
        # What another version measured is not what this one computes.
        "omniq": omniq_compile.__version__,
        "torch": torch.__version__,
        "folder": fingerprint(setting.folder, hub_arguments(setting.loading)),
        "quantization": as_given(setting.config),
        "variant": setting.loading.get("variant"),
        "arguments": dict(setting.arguments),
        "images": by_argument(setting.images, lambda image: image.digest),
        "seeds": list(setting.seeds),
        "device": str(setting.device),
        "calls": arguments.calls,
    }
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.completed} done"), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with work_folder(out) as work:
        state = TuneState(out / "state.json", about, restart=arguments.restart)
        if state.resumed:
            console.print(
                f"going on from {state.resumed} measurements in {out}", soft_wrap=True, markup=False
            )
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=None)

            def on_work(what: str) -> None:
                progress.update(bar, advance=1, description=what)

            found = tune(
                setting, goal, state, work, on_work,
                most_measurements=arguments.measurements, most_calls=arguments.calls,
            )  # fmt: skip
        method = arguments.method
        quality_plot(out / "quality.png", found, goal, f"{method}: quality for bytes")
        write_json(out / "tuned.json", _content(setting, goal, found))
    _print(found, out, console)
    return 0


def _content(setting: Any, goal: Any, found: Any) -> dict[str, Any]:
    from omniq_compile.pipelines.images import by_argument

    given = found.quantization
    lists = {"": given} if "method" in given else given
    ignored = {name: o["ignored_layers"] for name, o in lists.items() if o is not None}
    return {
        "version": 1,
        "folder": setting.folder,
        "goal": {"psnr": goal.psnr, "max_bytes": goal.max_bytes},
        "ignored_layers": ignored.get("", ignored),
        "quantization": given,
        "seeds": list(setting.seeds),
        "variant": setting.loading.get("variant"),
        "revision": setting.loading.get("revision"),
        "arguments": dict(setting.arguments),
        "images": by_argument(setting.images, lambda image: str(image.file)),
        "verified_psnr": dict(zip(map(str, setting.seeds), found.seed_psnr, strict=True)),
        "bytes": found.nbytes,
        "bytes_all_quantized": found.nbytes_all_quantized,
        "bytes_bf16": found.nbytes_bf16,
        "points": [list(point) for point in found.points],
        "layers": found.layers,
    }


def _print(found: Any, out: Path, console: Console) -> None:
    """Print the options on standard output, alone, and what they reach on the other."""
    console.print(
        f"{len(found.kept)} of {len(found.layers)} layers kept; "
        f"{found.nbytes:,} bytes (all quantized {found.nbytes_all_quantized:,}, "
        f"BF16 {found.nbytes_bf16:,}); PSNR of the worst seed {min(found.seed_psnr):.2f} dB, "
        f"by real generation; wrote {out}",
        soft_wrap=True,
        markup=False,
    )
    print(json.dumps(found.quantization))
