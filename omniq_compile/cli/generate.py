"""``omniq generate``: run a pipeline with quantized components, from its folder to a picture."""

from __future__ import annotations

import argparse
import inspect
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from rich.console import Console

from omniq_compile.cli.loading_arguments import add_dtype_argument
from omniq_compile.cli.output_file import check_writable
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
from omniq_compile.cli.whole_numbers import seed
from omniq_compile.components import build_quant_config
from omniq_compile.given_images import read_images, with_images
from omniq_compile.lowering.errors import OmniqError, OptionError
from omniq_compile.pipeline_call import (
    call_worded,
    check_call,
    check_call_of_folder,
    compile_component,
    load_worded,
)
from omniq_compile.saving import stored_options

VIDEO_SUFFIXES = (".mp4", ".gif")
FRAMES_PER_SECOND = 16  # Wan's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", help="a diffusers pipeline, or a hub id")
    add_quantization_argument(parser, required=False)
    add_call_arguments(parser)
    add_dtype_argument(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the noise; 0 by default")
    parser.add_argument("--out", required=True, type=Path, help=".png, .jpg, .gif or .mp4")
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
    for path in save_result(result, arguments.out):
        console.print(f"wrote {path}", soft_wrap=True, markup=False)
    return 0


def returns_video(pipeline: type) -> bool | None:
    """Say whether a class of pipelines returns the frames of a video, or else pictures.

    Known by the class of outputs that its module names; None where it names neither or both.
    """
    fields: set[str] = set()
    for cls in pipeline.__mro__[: pipeline.__mro__.index(DiffusionPipeline)]:
        for value in vars(sys.modules[cls.__module__]).values():
            if isinstance(value, type) and issubclass(value, BaseOutput):
                fields |= {"frames", "images"}.intersection(value.__annotations__)
    return "frames" in fields if len(fields) == 1 else None


def check_ending(out: Path, video: bool | None) -> None:
    """Check that a file's ending names a format that the result can be saved in.

    Args:
        out: the file.
        video: whether it is one, or else a picture; None where that is not known yet.

    Raises:
        OptionError: it does not.
    """
    videos = " or ".join(VIDEO_SUFFIXES)
    if video is not False and out.suffix in VIDEO_SUFFIXES:
        return
    if video:
        raise OptionError(f"--out {out}: a video is saved as {videos}.")
    # Pillow looks at the ending alone, in any case.
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise OptionError(
            f"--out {out} cannot be written: no picture ends in {out.suffix!r}. "
            f"Name it .png or .jpg{'' if video is False else f', or {videos} for a video'}."
        )


def check_encoder(out: Path) -> None:
    """Check that what diffusers writes an .mp4 with is installed: OpenCV where imageio is not.

    Raises:
        OptionError: it is not.
    """
    needed = "imageio_ffmpeg" if find_spec("imageio") else "cv2"
    if out.suffix == ".mp4" and find_spec(needed) is None:
        raise OptionError(
            f"--out {out}: .mp4 needs an encoder: pip install imageio imageio-ffmpeg, or name it "
            ".gif."
        )


def save_result(result: Any, out: Path) -> list[Path]:
    """Save what a pipeline returned: pictures or videos, one a file.

    Raises:
        OmniqError: it returned neither.
        OptionError: the file's ending does not fit, or it cannot be written.
    """
    frames = getattr(result, "frames", None)
    images: Any = getattr(result, "images", None)
    if frames is None and images is None:
        raise OmniqError(f"the pipeline returned {type(result).__name__}, which has no pictures.")
    try:
        made = _in_a_row(images) if frames is None else frames
        many = len(made) > 1
        paths = [out.with_stem(f"{out.stem}_{i}") if many else out for i in range(len(made))]
        for one, path in zip(made, paths, strict=True):
            if frames is None:
                _picture(one).save(path)
            else:
                _save_video([_picture(frame) for frame in one], path)
        return paths
    except OptionError:
        raise  # it is a ValueError too
    except (OSError, ValueError) as error:
        raise OptionError(f"--out {out} cannot be written: {error}.") from error


def _in_a_row(images: Any) -> list[Any]:
    """Return pictures one after the other; pipelines of layers return those of each picture."""
    row: list[Any] = []
    for image in images:
        several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
        row.extend(image if several else [image])
    return row


def _picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        image = image.float().cpu().movedim(0, -1)  # numpy has no BF16, and channels last
    array = np.asarray(image, dtype=np.float32)
    return Image.fromarray((array.squeeze() * 255).round().clip(0, 255).astype(np.uint8))


def _save_video(frames: list[Image.Image], out: Path) -> None:
    check_ending(out, video=True)
    if out.suffix == ".mp4":
        from diffusers.utils import export_to_video

        export_to_video(frames, str(out), fps=FRAMES_PER_SECOND)
    else:
        duration = 1000 // FRAMES_PER_SECOND
        frames[0].save(out, save_all=True, append_images=frames[1:], duration=duration, loop=0)
