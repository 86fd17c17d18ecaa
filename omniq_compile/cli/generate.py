"""``omniq generate``: run a pipeline with quantized components, from its folder to a picture."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import torch
from rich.console import Console

from omniq_compile.cli.loading_arguments import add_dtype_argument
from omniq_compile.cli.output_file import check_writable
from omniq_compile.cli.picture_file import check_encoder, check_ending, save_result
from omniq_compile.cli.pipeline_call import (
    add_call_arguments,
    given_arguments,
    pipeline_arguments,
    usable_device,
)
from omniq_compile.cli.quantization import (
    add_quantization_argument,
    describe_component,
    read_quantization,
)
from omniq_compile.cli.whole_numbers import positive, seed
from omniq_compile.components import build_quant_config
from omniq_compile.given_images import read_images, with_images
from omniq_compile.pipeline_call import (
    call_worded,
    check_call,
    check_call_of_folder,
    compile_component,
    load_worded,
)
from omniq_compile.pipeline_output import frame_rate, has_sound, returns_video
from omniq_compile.saving import stored_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", help="a diffusers pipeline, or a hub id")
    add_quantization_argument(parser, required=False)
    add_call_arguments(parser)
    add_dtype_argument(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the noise; 0 by default")
    parser.add_argument("--out", required=True, type=Path, help=".png, .jpg, .gif or .mp4")
    parser.add_argument(
        "--fps",
        type=positive,
        help="frames that a video shows in a second; those of the pipeline's call by default",
    )
    parser.add_argument(
        "--eager", action="store_true", help="do not compile: slower, starts at once"
    )


def run(arguments: argparse.Namespace) -> int:
    """Load, generate and save."""
    import omniq_compile as omniq

    check_writable("--out", arguments.out)
    check_ending(arguments.out, video=None)
    config = build_quant_config(read_quantization(arguments.quantization))
    device = usable_device(arguments.device)
    given = with_images(given_arguments(arguments), read_images(arguments.image))
    given["generator"] = torch.Generator().manual_seed(arguments.seed)
    loading = pipeline_arguments(arguments)
    check_call_of_folder(arguments.folder, given, loading)
    pipe = load_worded(arguments.folder, config, device=device, **loading)
    check_call(type(pipe), given)
    check_ending(arguments.out, returns_video(type(pipe)))
    check_encoder(arguments.out)
    pipe.to(device)
    console = Console(stderr=True)
    for name, component in pipe.components.items():
        options = config.options_for(name)
        if not isinstance(component, torch.nn.Module):
            continue
        options = options or stored_options(component)
        if options is None:
            continue
        line, quantized = describe_component(name, component, options)
        if not quantized:
            line = f"warning: {line}"
        if not arguments.eager:
            line += f"; {compile_component(component, options)}"
        console.print(line, soft_wrap=True, markup=False)
    with omniq.denoise_step(0) as step:
        if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
            given.setdefault("callback_on_step_end", step)
        result = call_worded(pipe, given)
    rate = arguments.fps or frame_rate(pipe, given)
    for path in save_result(result, arguments.out, rate):
        console.print(f"wrote {path}", soft_wrap=True, markup=False)
    if has_sound(result):
        console.print("the pipeline made sound too, which is not saved", soft_wrap=True)
    return 0
