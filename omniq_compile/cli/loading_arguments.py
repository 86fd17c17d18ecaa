"""The arguments that say which weights of a folder are loaded, and in which dtype."""

from __future__ import annotations

import argparse
from typing import Any

import torch

DTYPES = ("bfloat16", "float16", "float32")


def add_variant_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that chooses among files of weights."""
    parser.add_argument(
        "--variant", help="of the files of weights, such as fp16; components without it come plain"
    )


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument for what is not quantized."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of everything that is not quantized; bfloat16 by default"
    )


def loading_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a command line says, of the arguments above, to ``from_pretrained``."""
    given: dict[str, Any] = {}
    if arguments.variant is not None:
        given["variant"] = arguments.variant
    if getattr(arguments, "dtype", None) is not None:
        given["dtype"] = getattr(torch, arguments.dtype)
    return given
