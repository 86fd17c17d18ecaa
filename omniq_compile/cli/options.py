"""The arguments that stand for a user's options, the same for every command."""

from __future__ import annotations

import argparse
from typing import Any

from omniq_compile.cli.json_values import named_values

EXAMPLE = "weight_block_size=[128,128]"


def add_option_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one argument an option of `QuantConfig` that shapes the graph."""
    parser.add_argument("--method", required=True, help="such as int8; `omniq kernels` lists all")
    parser.add_argument(
        "--ignored-layers",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="layers to keep, such as img_mlp",
    )
    parser.add_argument(
        "--min-features",
        type=int,
        metavar="N",
        help="the smallest width of a layer, in or out, worth quantizing",
    )
    parser.add_argument(
        "--matmul", action="store_true", help="also quantize activation x activation products"
    )
    parser.add_argument(
        "--option",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=JSON",
        help=f"any other option: {EXAMPLE}",
    )


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given; the rest keep their defaults.

    Raises:
        OptionError: an ``--option`` that is not NAME=JSON, or says again what another one says.
    """
    options: dict[str, Any] = {"method": arguments.method}
    for name in ("ignored_layers", "min_features"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    if arguments.matmul:
        options["matmul"] = True
    said = {name: f"--{name.replace('_', '-')}" for name in options}
    if getattr(arguments, "target", None) is not None:
        said["target"] = "--target"
    return options | named_values("--option", arguments.option, EXAMPLE, said)
