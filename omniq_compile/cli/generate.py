"""``omniq generate``: run a pipeline with quantized components, from its folder to a file."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from omniq_compile.cli.loading_arguments import add_dtype_argument
from omniq_compile.cli.pipeline_arguments import (
    add_call_arguments,
    add_compiler_argument,
    given_arguments,
    pipeline_arguments,
    usable_device,
)
from omniq_compile.cli.quantization import (
    add_quantization_argument,
    describe_component,
    described_after,
    read_quantization,
)
from omniq_compile.cli.whole_numbers import positive, seed
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.output_file import check_writable
from omniq_compile.pipelines.components import build_quant_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", help="a diffusers pipeline, or a hub id")
    add_quantization_argument(parser, required=False)
    add_call_arguments(parser)
    add_dtype_argument(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the noise; 0 by default")
    parser.add_argument("--out", required=True, type=Path, help=".png, .jpg, .gif, .mp4 or .wav")
    parser.add_argument(
        "--fps",
        type=positive,
        help="frames that a video shows in a second; those of the pipeline's call by default",
    )
    compiled = parser.add_mutually_exclusive_group()
    add_compiler_argument(compiled)
    compiled.add_argument(
        "--eager", action="store_true", help="do not compile: slower, starts at once"
    )


def run(arguments: argparse.Namespace) -> int:
    """Load, generate and save."""
    # Late: diffusers takes seconds to import, which --help need not wait for.
    import omniq_compile as omniq
    from omniq_compile.checkpoints.recorded_options import options_to_run
    from omniq_compile.cli import sound_file
    from omniq_compile.cli.picture_file import (
        check_encoder,
        check_ending,
        check_rate,
        save_result,
    )
    from omniq_compile.pipelines.call import (
        CALLBACK,
        call_worded,
        check_call,
        check_call_of_folder,
        compile_component,
        load_worded,
    )
    from omniq_compile.pipelines.images import read_images, with_images
    from omniq_compile.pipelines.output import frame_rate, kind_returned
    from omniq_compile.pipelines.sound import has_sound, sound_of

    check_writable("--out", arguments.out)
    check_ending(arguments.out, None)
    check_rate(arguments.out, arguments.fps)
    config = build_quant_config(read_quantization(arguments.quantization))
    config = config.with_options(compiler=arguments.compiler, ignored_layers=())
    device = usable_device(arguments.device)
    given = with_images(given_arguments(arguments), read_images(arguments.image))
    given["generator"] = torch.Generator().manual_seed(arguments.seed)
    loading = pipeline_arguments(arguments)
    known = check_call_of_folder(arguments.folder, given, loading, config, sound=True)
    if known is not None:
        check_ending(arguments.out, kind_returned(known))
    check_encoder(arguments.out)
    with described_after():
        pipe = load_worded(arguments.folder, config, device=device, **loading)
    if known is None:  # its class came with the folder
        check_call(type(pipe), given, config)
        check_ending(arguments.out, kind_returned(type(pipe)))
    pipe.to(device)
    console = Console(stderr=True)
    says_nothing = True
    for name, component in pipe.components.items():
        options = config.options_for(name)
        if not isinstance(component, torch.nn.Module):
            continue
        options = options_to_run(component, options)
        if options is None:
            continue
        if arguments.compiler:  # what was stored quantized says nothing of it
            options = {**options, "compiler": arguments.compiler}
        line, quantized = describe_component(name, component, options)
        if not quantized:
            line = f"warning: {line}"
        if not arguments.eager and (quantized or options.get("matmul")):
            line += f"; {compile_component(component, options)}"
        console.print(line, soft_wrap=True, markup=False)
        says_nothing = False
    if says_nothing:
        line = f"warning: {arguments.folder} is not quantized: name a method with --quantization"
        console.print(line, soft_wrap=True, markup=False)
    with omniq.denoise_step(0) as step:
        if CALLBACK in inspect.signature(pipe.__call__).parameters:
            given.setdefault(CALLBACK, step)
        result = call_worded(pipe, given)
    if has_sound(result) and arguments.out.suffix.lower() == sound_file.SUFFIX:
        paths = sound_file.save_sound(sound_of(pipe, result), arguments.out)
    else:
        paths = save_result(result, arguments.out, arguments.fps or frame_rate(pipe, given))
        if has_sound(result):
            paths += _save_beside(pipe, result, arguments.out, console)
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True, markup=False)
    return 0


def _save_beside(pipe: Any, result: Any, out: Path, console: Console) -> list[Path]:
    """Save a video's sound by the name of the video, which is there and stays if this fails."""
    from omniq_compile.cli.sound_file import save_sound
    from omniq_compile.pipelines.sound import sound_of

    try:
        return save_sound(sound_of(pipe, result), out)
    except OmniqError as error:
        console.print(f"warning: sound is not saved: {error}", soft_wrap=True, markup=False)
        return []
