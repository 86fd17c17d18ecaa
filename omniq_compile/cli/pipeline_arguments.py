"""What the commands that run a diffusers pipeline share: its arguments, and their check."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from omniq_compile.cli.json_values import named_values
from omniq_compile.cli.loading_arguments import (
    add_hub_arguments,
    add_variant_argument,
    loading_arguments,
)
from omniq_compile.cli.whole_numbers import positive
from omniq_compile.lowering.errors import OptionError, unknown
from omniq_compile.passes.option_checks import COMPILERS
from omniq_compile.pipelines.components import build_quant_config

if TYPE_CHECKING:
    from omniq_compile.quality.comparison import Setting

# Arguments of a pipeline's call that options of their own give; a generator there always is.
OWN_FLAGS = {"prompt": "--prompt", "num_inference_steps": "--steps", "generator": "the seed"}
# What pictures come as: the others that diffusers has are latents.
OUTPUT_TYPES = ("pil", "np", "pt")

# Arguments of diffusers' calls that count something.
SIZES = ("height", "width", "num_frames", "num_inference_steps", "num_images_per_prompt")


def add_call_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what shapes a call of the pipeline, but for its seed."""
    parser.add_argument("--prompt", help="for pipelines that take one")
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="a picture that the pipeline takes as its 'image', or NAME=FILE as another argument "
        "(mask_image=mask.png); several of one name are a list",
    )
    parser.add_argument(
        "--steps", type=positive, help="denoising steps; the pipeline's own by default"
    )
    parser.add_argument(
        "--argument",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=JSON",
        help="any other argument of the pipeline's call: height=512, digits=[0,1,2]",
    )
    add_variant_argument(parser)
    add_hub_arguments(parser)
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the folder brings along"
    )
    parser.add_argument("--device", default="cpu", help="such as cuda; %(default)s by default")


def pipeline_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line says to ``from_pretrained``, but for the device.

    Raises:
        OptionError: a revision of what is no hub id.
    """
    trusted = {"trust_remote_code": True} if arguments.trust_remote_code else {}
    return {**loading_arguments(arguments), **trusted}


def given_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a pipeline's call that the command line gives, without images.

    Raises:
        OptionError: an ``--argument`` that is not NAME=JSON or is said twice, a size under 1, or
            what nothing could be saved of.
    """
    given: dict[str, Any] = {}
    if arguments.prompt is not None:
        given["prompt"] = arguments.prompt
    if arguments.steps is not None:
        given["num_inference_steps"] = arguments.steps
    said = {name: flag for name, flag in OWN_FLAGS.items() if name in given or name == "generator"}
    given |= named_values("--argument", arguments.argument, "height=512", said)
    _check_sizes(given)
    _check_returns_pictures(given)
    return given


def _check_sizes(given: Mapping[str, Any]) -> None:
    """Refuse before loading what diffusers takes for no size at all, or fails at after it."""
    for name in SIZES:
        value = given.get(name)
        if isinstance(value, (int, float)) and value < 1:
            raise OptionError(f"--argument {name}={json.dumps(value)}: {name} is at least 1.")


def _check_returns_pictures(given: Mapping[str, Any]) -> None:
    """Refuse before a whole generation what would return no pictures."""
    output_type = given.get("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise OptionError(
            unknown("output_type", output_type, OUTPUT_TYPES) + " Others are no pictures."
        )
    if given.get("return_dict") is False:
        raise OptionError("return_dict=false returns no named pictures. Leave it out.")


def add_quality_arguments(parser: argparse.ArgumentParser, *, seeds: str) -> None:
    """Add what the commands that measure quality share."""
    parser.add_argument(
        "--seeds", default=seeds, help="such as 0-7 or 3,10-12; %(default)s by default"
    )
    add_compiler_argument(parser)


def add_compiler_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--compiler``, which is the option of every component."""
    parser.add_argument(
        "--compiler",
        choices=COMPILERS,
        help="what compiles the graphs: aot_eager starts faster and runs slower than inductor",
    )


def quality_setting(
    arguments: argparse.Namespace, quantization: Any, ignored_layers: Sequence[str] = ()
) -> Setting:
    """Return what is to be generated, with every argument checked that can be before loading.

    Raises:
        OptionError: unknown options, seeds or devices, files that are no pictures, or an argument
            that is given as a picture and again.
    """
    from omniq_compile.pipelines.call import check_call_of_folder
    from omniq_compile.pipelines.images import read_images, with_images
    from omniq_compile.quality.comparison import Setting
    from omniq_compile.quality.generation import parse_seeds

    config = build_quant_config(quantization)
    given = given_arguments(arguments)
    images = read_images(arguments.image)
    loading = pipeline_arguments(arguments)
    call = {**with_images(given, images), "generator": None}
    check_call_of_folder(arguments.folder, call, loading, config)
    return Setting(
        folder=arguments.folder,
        config=config.with_options(compiler=arguments.compiler, ignored_layers=ignored_layers),
        arguments=given,
        seeds=parse_seeds(arguments.seeds),
        device=usable_device(arguments.device),
        loading=loading,
        images=images,
    )


def usable_device(text: str) -> torch.device:
    """Return the device that ``--device`` names, which was tried.

    Raises:
        OptionError: it is unknown, or this machine has none.
    """
    from omniq_compile.checkpoints.load_arguments import tried

    try:
        device = tried(text)
    except RuntimeError as error:
        raise OptionError(f"--device {text!r} cannot be used: {error}") from error
    if device.type == "meta":
        raise OptionError(f"--device {text!r} cannot be used: its tensors have no values.")
    return torch.device(text)
