"""Draw every digit in BF16 and again through omniq, and measure what quantizing changed."""

import argparse
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from judge import mean_psnr, psnr_per_picture, read_digits
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / "pipeline"
NUM_STEPS = 20
SEED = 0
DIFFERENCE_GAIN = 50
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
    diffusers_logging.disable_progress_bar()
    # Newer diffusers say `dtype`; the old name works in every version the project supports.
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    # Qwen-Image's rotary embedding is complex: Inductor leaves those few operators as they are.
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


def weight_stats(
    pipe: DiffusionPipeline, digits: list[int], options: dict[str, Any]
) -> WeightStats:
    """Ask omniq what it does with each GEMM site of `pipe`'s uncompiled transformer."""
    import omniq_compile as omniq

    inputs = pipe.transformer_inputs(digits, torch.zeros(len(digits), 16, 4), torch.tensor(0.5))
    report = omniq.explain(pipe.transformer, inputs, options)
    num_kept = sum(site.decision.method is None for site in report.sites)
    num_bytes = sum(parameter.nbytes for parameter in pipe.transformer.parameters())
    return WeightStats(
        num_rewritten=len(report.sites) - num_kept,
        num_kept=num_kept,
        bytes_before=num_bytes,
        # The report counts only the weights that are quantized.
        bytes_after=num_bytes - report.weight_bytes_before + report.weight_bytes_after,
    )


def contact_sheet(images: np.ndarray, num_samples: int) -> np.ndarray:
    """Lay pictures `[10 * num_samples, 8, 8]`, sorted by digit, out in a column per digit.

    Returns `[10 * num_samples, 100]`: each picture has one blank pixel around it.
    """
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    columns = framed.reshape(10, num_samples * TILE, TILE)
    return columns.transpose(1, 0, 2).reshape(num_samples * TILE, 10 * TILE)


def save_figure(
    path: Path, bf16: np.ndarray, quantized: np.ndarray, method: str, num_samples: int
) -> None:
    """Save both sets of pictures `[n, 8, 8]` and their amplified difference as a PNG."""
    difference = np.abs(bf16 - quantized) * DIFFERENCE_GAIN
    panels = [
        ("BF16", bf16, "gray_r"),
        (f"{method} through omniq", quantized, "gray_r"),
        (f"absolute difference x {DIFFERENCE_GAIN}", difference, "Reds"),
    ]
    size = (15, 0.9 + 0.49 * num_samples)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, (title, images, colors) in zip(axes, panels, strict=True):
        sheet = contact_sheet(images, num_samples)
        axis.imshow(sheet, cmap=colors, vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=16, pad=10)
        axis.set_xticks(np.arange(10) * TILE + TILE / 2 - 0.5, [str(d) for d in range(10)])
        axis.set_yticks([])
        axis.tick_params(length=0, labelsize=13)
        axis.spines[:].set_color("0.8")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def result_table(
    digits: list[int], bf16: np.ndarray, quantized: np.ndarray, stats: WeightStats, method: str
) -> Table:
    """Build the table of all measurements; pictures are `[n, 8, 8]` from 0 to 1."""
    psnr = psnr_per_picture(bf16, quantized)
    num_right = [int((read_digits(images) == digits).sum()) for images in (bf16, quantized)]
    num_layers = stats.num_rewritten + stats.num_kept
    table = Table(title=f"{len(digits)} pictures, {NUM_STEPS} steps, same starting noise")
    table.add_column("")
    table.add_column("BF16", justify="right")
    table.add_column(f"omniq {method}", justify="right")
    table.add_row("PSNR to BF16, mean", "", f"{mean_psnr(psnr):.1f} dB")
    table.add_row("PSNR to BF16, worst picture", "", f"{psnr.min():.1f} dB")
    table.add_row(
        "pictures read as the digit asked for", *(f"{n} of {len(digits)}" for n in num_right)
    )
    table.add_row("bytes of weights", f"{stats.bytes_before:,}", f"{stats.bytes_after:,}")
    table.add_row(f"layers in {method}", "0", str(stats.num_rewritten))
    table.add_row("layers kept in BF16", str(num_layers), str(stats.num_kept))
    return table


def time_one_block(method: str, console: Console) -> None:
    """Time one Qwen-Image block at true width, and print its ratio to Inductor in BF16."""
    from omniq_compile.cli.bench import print_table, run_bench
    from omniq_compile.cli.bench_result import BenchConfig

    config = BenchConfig(method=method, eager=False, torchao=False, rounds=3)
    print_table(run_bench(config, console), console)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the picture")
    parser.add_argument("--method", default="int8", help="the method omniq quantizes with")
    parser.add_argument("--samples", type=int, default=8, help="pictures of each digit")
    parser.add_argument("--skip-bench", action="store_true", help="do not time a block")
    args = parser.parse_args()
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    return args


def main() -> None:
    args = parse_args()
    console = Console()
    options = {"method": args.method, "min_features": 64}
    digits = [digit for digit in range(10) for _ in range(args.samples)]

    pipe = load_pipeline()
    bf16 = draw(pipe, digits, "BF16, eager", console)
    stats = weight_stats(pipe, digits, options)
    pipe.transformer = torch.compile(pipe.transformer, backend="omniq", options=options)
    quantized = draw(pipe, digits, f"omniq {args.method}, compiles first", console)

    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / f"digits_{args.method}.png"
    save_figure(picture, bf16, quantized, args.method, args.samples)
    console.print(result_table(digits, bf16, quantized, stats, args.method))
    console.print(f"wrote {picture}")
    if not args.skip_bench:
        time_one_block(args.method, console)


if __name__ == "__main__":
    main()
