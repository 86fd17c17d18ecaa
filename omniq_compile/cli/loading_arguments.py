"""The arguments that say which weights of a folder or hub id are loaded, and in which dtype."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from omniq_compile.lowering.errors import OptionError

DTYPES = ("bfloat16", "float16", "float32")


def add_variant_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that chooses among files of weights."""
    parser.add_argument(
        "--variant", help="of the files of weights, such as fp16; components without it come plain"
    )


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a download."""
    parser.add_argument("--revision", help="of a hub id: a branch, a tag or a commit")
    parser.add_argument(
        "--token",
        type=_token,
        help="for a hub id that is not public; HF_TOKEN of the environment by default, which no "
        "list of processes shows",
    )


def _token(text: str) -> str:
    # As a script has it whose secret is not set; requests would fail with it in their own words.
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: leave it out, or give one of your hub account")
    return text.strip()


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument for what is not quantized."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of everything that is not quantized; bfloat16 by default"
    )


def downloading_arguments(arguments: argparse.Namespace, *models: str) -> dict[str, Any]:
    """Return what a command line says of the download.

    Args:
        arguments: of the command.
        models: what it names: folders, hub ids and others.

    Raises:
        OptionError: a revision, where one of them is no hub id and so has none.
    """
    # Late, as it imports diffusers, which takes seconds that --help need not wait for.
    from omniq_compile.checkpoints.hub_download import may_be_hub_id

    for model in models:
        if arguments.revision is not None and not may_be_hub_id(model):
            raise OptionError(
                f"--revision is of a hub id, such as Qwen/Qwen-Image, and {model} is none. "
                "Leave it out."
            )
    given = {"revision": arguments.revision, "token": arguments.token}
    return {name: value for name, value in given.items() if value is not None}


def loading_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a command line says, of the arguments above, to ``from_pretrained``.

    Raises:
        OptionError: see `downloading_arguments`.
    """
    given = downloading_arguments(arguments, arguments.folder)
    if arguments.variant is not None:
        given["variant"] = arguments.variant
    if getattr(arguments, "dtype", None) is not None:
        given["dtype"] = getattr(torch, arguments.dtype)
    return given
