"""Draw every digit in BF16 and again through omniq, and measure what quantizing changed."""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from judge import mean_psnr, psnr_per_picture, read_digits
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FOLDER = Path(__file__).parent / "pipeline"
NUM_STEPS = 20
SEED = 0
DIFFERENCE_GAIN = 50
SMALL_GAIN = 5
# As README.md lists them; omniq is imported late, because the BF16 pictures do without it.
METHODS = ("int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale")
TILE = 10


class WeightStats(NamedTuple):
    """What omniq did to the transformer's layers, and bytes of all its weights, both ways."""

    num_rewritten: int
    num_kept: int
    bytes_before: int
    bytes_after: int


def load_pipeline() -> DiffusionPipeline:
    if not (FOLDER / "model_index.json").is_file():
        raise SystemExit(
            f"no pipeline in {FOLDER}: train it with `python examples/digits/train.py`"
        )
    # Diffusers imports torchao where it is installed, which warns of parts that nothing here uses.
    for name in (
        "torchao",
        "torch.utils._pytree",
        "diffusers.quantizers.torchao.torchao_quantizer",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    from diffusers import DiffusionPipeline

    diffusers_logging.disable_progress_bar()
    # Newer diffusers say `dtype`; the old name works in every version the project supports.
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    # Qwen-Image's rotary frequencies are complex: Inductor leaves the operators that arrange them.
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    pipe = DiffusionPipeline.from_pretrained(
        str(FOLDER), trust_remote_code=True, torch_dtype=torch.bfloat16
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiffusionPipeline, digits: list[int], label: str, console: Console) -> np.ndarray:
    """Return pictures of `digits`, float32 `[n, 8, 8]` from 0 to 1, from the demo's seed."""
    with Progress(
        SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task(label, total=NUM_STEPS)

        def advance(
            _pipe: DiffusionPipeline, _step: int, _timestep: torch.Tensor, kwargs: dict[str, Any]
        ) -> dict[str, Any]:
            progress.update(task, advance=1)
            return kwargs

        return pipe(
            digits,
            num_inference_steps=NUM_STEPS,
            generator=torch.Generator().manual_seed(SEED),
            callback_on_step_end=advance,
        ).images


def quantize_transformer(
    transformer: nn.Module, options: dict[str, Any]
) -> tuple[nn.Module, WeightStats]:
    """Return a copy whose blocks are stored and computed by a method, and what that changed."""
    import omniq_compile as omniq

    copied = copy.deepcopy(transformer)
    # What stands outside the blocks is not compiled below, so it stays in BF16.
    rows = omniq.quantize_(copied, options | {"ignored_layers": ["re:(?!transformer_blocks).*"]})
    num_rewritten = sum(row.method is not None for row in rows)
    stats = WeightStats(
        num_rewritten=num_rewritten,
        num_kept=len(rows) - num_rewritten,
        bytes_before=sum(parameter.nbytes for parameter in transformer.parameters()),
        bytes_after=sum(parameter.nbytes for parameter in copied.parameters()),
    )
    return omniq.compile(copied, options), stats


def contact_sheet(images: np.ndarray, num_samples: int) -> np.ndarray:
    """Lay pictures `[10 * num_samples, 8, 8]`, sorted by digit, out in a column per digit.

    Returns `[10 * num_samples, 100]`: each picture has one blank pixel around it.
    """
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    columns = framed.reshape(10, num_samples * TILE, TILE)
    return columns.transpose(1, 0, 2).reshape(num_samples * TILE, 10 * TILE)


def save_figure(
    path: Path, bf16: np.ndarray, runs: dict[str, np.ndarray], num_samples: int
) -> None:
    """Save all pictures `[n, 8, 8]`, and under each method its amplified difference to BF16."""
    # Four-bit methods change whole strokes: their difference needs no such gain to be seen.
    gain = DIFFERENCE_GAIN if len(runs) == 1 else SMALL_GAIN
    columns = 1 + len(runs)
    size = (5 * columns, 2 * (0.9 + 0.49 * num_samples))
    figure, axes = plt.subplots(2, columns, figsize=size, layout="constrained")
    show(axes[0, 0], "BF16", contact_sheet(bf16, num_samples), "gray_r")
    axes[1, 0].set_axis_off()
    for (method, images), (above, below) in zip(runs.items(), axes[:, 1:].T, strict=True):
        show(above, f"{method} through omniq", contact_sheet(images, num_samples), "gray_r")
        difference = contact_sheet(np.abs(bf16 - images) * gain, num_samples)
        show(below, f"absolute difference x {gain}", difference, "Reds")
    figure.savefig(path, dpi=110 if len(runs) == 1 else 60)
    plt.close(figure)


def show(axis: Axes, title: str, sheet: np.ndarray, colors: str) -> None:
    """Draw a contact sheet with a column per digit."""
    axis.imshow(sheet, cmap=colors, vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=16, pad=10)
    axis.set_xticks(np.arange(10) * TILE + TILE / 2 - 0.5, [str(d) for d in range(10)])
    axis.set_yticks([])
    axis.tick_params(length=0, labelsize=13)
    axis.spines[:].set_color("0.8")


def result_table(
    digits: list[int],
    bf16: np.ndarray,
    runs: dict[str, np.ndarray],
    stats: dict[str, WeightStats],
) -> Table:
    """Build the table of all measurements; pictures are `[n, 8, 8]` from 0 to 1."""
    # Seven columns within a terminal's 80 characters.
    table = Table(
        title=f"{len(digits)} pictures, {NUM_STEPS} steps, same starting noise; PSNR to BF16 in dB"
    )
    table.add_column("")
    for column in ("PSNR", "worst", "as asked", "bytes", "rewritten", "kept"):
        table.add_column(column, justify="right")

    def read(images: np.ndarray) -> str:
        return f"{int((read_digits(images) == digits).sum())} of {len(digits)}"

    first = next(iter(stats.values()))
    num_layers = str(first.num_rewritten + first.num_kept)
    table.add_row("BF16", "", "", read(bf16), f"{first.bytes_before:,}", "0", num_layers)
    for method, images in runs.items():
        psnr, stat = psnr_per_picture(bf16, images), stats[method]
        table.add_row(
            method,
            f"{mean_psnr(psnr):.1f}",
            f"{psnr.min():.1f}",
            read(images),
            f"{stat.bytes_after:,}",
            str(stat.num_rewritten),
            str(stat.num_kept),
        )
    return table


def time_one_block(method: str, console: Console) -> None:
    """Time one Qwen-Image block at true width, and print its ratio to Inductor in BF16."""
    from omniq_compile.benchmark.result import BenchConfig
    from omniq_compile.cli.bench import print_table, run_bench

    config = BenchConfig(method=method, eager=False, torchao=False, rounds=3)
    print_table(run_bench(config, console), console)


def options_of(method: str) -> dict[str, Any]:
    """Return the options for the small transformer, whose layers are 64 wide at the least."""
    options: dict[str, Any] = {"method": method, "min_features": 64}
    if method == "mxfp4_dualscale":
        # The default keeps five blocks in BF16, and this transformer has four.
        options["num_bf16_fallback_layers"] = 1
    return options


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the picture")
    parser.add_argument(
        "--method",
        nargs="+",
        action="extend",
        choices=METHODS,
        help="the methods omniq quantizes with, one or several; all of them by default",
    )
    parser.add_argument("--samples", type=int, default=8, help="pictures of each digit")
    parser.add_argument("--skip-bench", action="store_true", help="do not time a block")
    args = parser.parse_args()
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    args.method = list(dict.fromkeys(args.method or METHODS))
    return args


def main() -> None:
    args = parse_args()
    console = Console()
    digits = [digit for digit in range(10) for _ in range(args.samples)]

    pipe = load_pipeline()
    transformer = pipe.transformer
    bf16 = draw(pipe, digits, "BF16, eager", console)
    runs: dict[str, np.ndarray] = {}
    stats: dict[str, WeightStats] = {}
    for method in args.method:
        torch._dynamo.reset()
        pipe.transformer, stats[method] = quantize_transformer(transformer, options_of(method))
        runs[method] = draw(pipe, digits, f"omniq {method}, compiles first", console)

    args.out.mkdir(parents=True, exist_ok=True)
    name = "_".join(args.method) if len(args.method) < len(METHODS) else "all_methods"
    picture = args.out / f"digits_{name}.png"
    save_figure(picture, bf16, runs, args.samples)
    console.print(result_table(digits, bf16, runs, stats))
    console.print(f"wrote {picture}")
    if not args.skip_bench:
        time_one_block(args.method[0], console)


if __name__ == "__main__":
    main()
