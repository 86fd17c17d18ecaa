"""``omniq plan``: what becomes of a model of any size, from its configuration alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.table import Table

from omniq_compile.cli.loading_arguments import add_hub_arguments, downloading_arguments
from omniq_compile.cli.options import add_option_arguments, options_of
from omniq_compile.cli.whole_numbers import positive
from omniq_compile.compiling.unmatched import warn_unmatched_in
from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.target import Target, detect
from omniq_compile.models.families import FAMILIES, WIDE_LATENTS, InputSize
from omniq_compile.output_file import check_writable, write
from omniq_compile.passes.config import QuantConfig
from omniq_compile.planning.meta_run import to_meta
from omniq_compile.planning.plan import Plan, plan_model
from omniq_compile.reports.display import to_text

if TYPE_CHECKING:
    from omniq_compile.models.configs import ModelConfig

# A VAE that shrinks an image 8 times a side, and patches of 2 x 2 latents; a video's VAE keeps
# the first frame and shrinks the others 4 times.
PIXELS_PER_TOKEN = 16
PIXELS_PER_TOKEN_OF_WIDE_LATENTS = 32
FRAMES_PER_LATENT = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, the options, the target, the size of a picture, and where to write."""
    parser.add_argument(
        "model",
        nargs="+",
        help="a diffusers folder, a hub id, a config.json, or Class[:preset]; several are planned "
        "together",
    )
    add_hub_arguments(parser)
    add_option_arguments(parser)
    parser.add_argument("--target", help="plan for this target, present or not (cuda:sm_90)")
    parser.add_argument(
        "--height", type=positive, help="pixels (default: 1024, for video 720 or 704)"
    )
    parser.add_argument("--width", type=positive, help="pixels (default: 1024, for video 1280)")
    parser.add_argument("--frames", type=positive, help="of a video (default: 81)")
    parser.add_argument(
        "--pictures",
        type=positive,
        default=1,
        help="in one call, of this size: the one drawn and those given to an edit, or layers "
        "(default: 1)",
    )
    parser.add_argument(
        "--text-tokens", type=positive, default=512, help="of the prompt (default: 512)"
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there, not to the terminal")


def run(arguments: argparse.Namespace) -> int:
    """Plan every model, and print a table each and the totals."""
    from omniq_compile.models.configs import find_configs  # late, as it imports diffusers

    check_writable("--out", arguments.out)
    config = QuantConfig.from_options(options_of(arguments))
    if arguments.target is None:
        target = config.target or detect("cpu")
    else:
        target = Target.parse(arguments.target)
    hub = downloading_arguments(arguments, *arguments.model)
    models = [model for text in arguments.model for model in find_configs(text, hub)]
    # All of them before the first is planned, which may take minutes.
    sizes = [_size(model, arguments) for model in models]
    plans = {
        model.name: (size, _plan(model, size, config, target))
        for model, size in zip(models, sizes, strict=True)
    }
    if arguments.format == "json":
        content = {name: dataclasses.asdict(plan) for name, (_, plan) in plans.items()}
        text = json.dumps(content, indent=2) + "\n"
    else:
        text = _render(plans, f"{config.scheme} on {target}")
    if arguments.out is None:
        sys.stdout.write(text)
        return 0
    write("--out", arguments.out, text)
    return 0


@dataclasses.dataclass(frozen=True)
class Size:
    """One call's picture, in pixels and frames, and its prompt, in tokens."""

    height: int
    width: int
    frames: int
    text_tokens: int
    pictures: int = 1

    def __str__(self) -> str:
        frames = f", {self.frames} frames" if self.frames > 1 else ""
        pictures = f"{self.pictures} pictures of " if self.pictures > 1 else ""
        pixels = f"{pictures}{self.width} x {self.height}{frames}"
        return f"{pixels}, {self.text_tokens} text tokens, batch 1"


def _size(model: ModelConfig, arguments: argparse.Namespace) -> Size:
    video = "3D" in model.class_name
    if arguments.frames is not None and not video:
        raise OptionError(f"--frames is for video, and {model.class_name} draws images")
    pixels_per_token = _pixels_per_token(model)
    # As near to 720 as whole tokens come: 720, or 704.
    default = (720 // pixels_per_token * pixels_per_token, 1280, 81) if video else (1024, 1024, 1)
    given = (arguments.height, arguments.width, arguments.frames)
    height, width, frames = (d if g is None else g for g, d in zip(given, default, strict=True))
    size = Size(height, width, frames, arguments.text_tokens, arguments.pictures)
    for name, pixels in (("--height", size.height), ("--width", size.width)):
        if pixels % pixels_per_token:
            raise OptionError(f"{name} {pixels} is not a multiple of {pixels_per_token} pixels")
    if (size.frames - 1) % FRAMES_PER_LATENT:
        raise OptionError(
            f"--frames {size.frames} is not one more than a multiple of {FRAMES_PER_LATENT}"
        )
    if size.pictures > 1 and not FAMILIES[model.class_name].several_pictures:
        several = " and ".join(name for name, row in FAMILIES.items() if row.several_pictures)
        raise OptionError(
            f"--pictures is for {several}, and {model.class_name} takes no second one into its "
            "sequence"
        )
    return size


def _pixels_per_token(model: ModelConfig) -> int:
    """Return the side of what a token shows: a VAE of many channels shrinks a side 16 times."""
    wide = model.arguments.get("out_channels") == WIDE_LATENTS
    return PIXELS_PER_TOKEN_OF_WIDE_LATENTS if wide else PIXELS_PER_TOKEN


def _plan(model: ModelConfig, size: Size, config: QuantConfig, target: Target) -> Plan:
    from omniq_compile.models.configs import build_model

    with torch.device("meta"):
        built = build_model(model)
    warn_unmatched_in(built, config)
    pixels_per_token = _pixels_per_token(model)
    grid = (size.height // pixels_per_token, size.width // pixels_per_token)
    latent_frames = (size.frames - 1) // FRAMES_PER_LATENT + 1
    drawn = InputSize(1, grid, size.text_tokens, torch.bfloat16, None, latent_frames, size.pictures)
    inputs = to_meta(FAMILIES[model.class_name].inputs(built, drawn))
    return plan_model(built, inputs, config, target)[0]


def _render(plans: dict[str, tuple[Size, Plan]], title: str) -> str:
    parts: list[Any] = []
    for name, (size, plan) in plans.items():
        parts += [f"[bold]{escape(name)}[/bold]: {title}; {size}", _table(plan), _totals(plan)]
    if len(plans) > 1:
        together = [plan for _, plan in plans.values()]
        before = sum(plan.weight_bytes_before for plan in together)
        after = sum(plan.weight_bytes_after for plan in together)
        parts.append(
            f"together: weights {_bytes(before)} -> {_bytes(after)}, where all are in memory at "
            "once"
        )
    return to_text(*parts) + "\n"


def _table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    left = {"layers": "left", "decision": "left", "kernel": "left", "reason": "left"}
    names = ("layers", "count", "M x K x N", "decision", "kernel", "GFLOP")
    for name in (*names, "MiB before", "MiB after", "reason"):
        justify: Any = left.get(name, "right")
        table.add_column(name, justify=justify, no_wrap=True)
    for row in plan.rows:
        kernel = f"{row.kernel}{'' if row.native else ' (emulated)'}" if row.kernel else "-"
        table.add_row(
            escape(row.kind),
            str(row.count),
            f"{row.M} x {row.K} x {row.N}",
            row.method or "kept",
            kernel,
            f"{row.flops / 1e9:,.1f}",
            f"{row.bytes_before / 2**20:,.1f}",
            f"{row.bytes_after / 2**20:,.1f}",
            escape(row.reason),
        )
    return table


def _totals(plan: Plan) -> str:
    quantized = [row for row in plan.rows if row.method]
    kept = [row for row in plan.rows if not row.method]
    low = sum(row.flops for row in quantized)
    after = sum(row.bytes_after for row in quantized)
    lines = [
        f"{plan.parameters / 1e9:.2f} billion parameters; "
        f"{sum(row.count for row in quantized)} products quantized, "
        f"{sum(row.count for row in kept)} kept",
        f"one call: {plan.flops / 1e12:.1f} TFLOP: {100 * low / plan.flops:.1f}% quantized, "
        f"{100 * plan.attention_flops / plan.flops:.1f}% attention; classifier-free guidance "
        "takes two calls a step",
        f"weights: {_bytes(plan.weight_bytes_before)} -> {_bytes(plan.weight_bytes_after)} "
        f"({_bytes(after)} quantized, {_bytes(plan.weight_bytes_after - after)} kept)",
        f"activations, estimated: {_bytes(plan.activation_bytes)} (tensors alive at once in an "
        "eager call in BF16, without attention's scores; compiled code needs less, and workspaces "
        "come on top)",
    ]
    if plan.decoded_bytes:
        lines.append(
            f"decoded weights, estimated: {_bytes(plan.decoded_bytes)} (the largest that a kernel "
            "decodes as a whole in a call, in float32)"
        )
    return "\n".join(lines) + "\n"


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
