"""The ``--quantization`` argument: a method, or JSON as `build_quant_config` takes it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from omniq_compile.lowering.errors import OptionError


def add_quantization_argument(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the argument; one that is not required means as the folder is stored."""
    parser.add_argument(
        "--quantization",
        required=required,
        metavar="METHOD|JSON",
        help='such as int8, or {"transformer": {"method": "mxfp4"}, "text_encoder": "int8"}',
    )


def read_quantization(text: str | None) -> Any:
    """Return what the argument says; None where it was not given.

    Raises:
        OptionError: it begins as JSON and is none.
    """
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionError(f"--quantization {text!r} is not JSON: {error}.") from error
