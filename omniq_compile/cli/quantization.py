"""The ``--quantization`` argument, as `build_quant_config` takes it, and what became of it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from omniq_compile.cli.json_values import read_json
from omniq_compile.lowering.errors import OptionError
from omniq_compile.passes.config import QuantConfig


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
        return read_json(text)
    except ValueError as error:
        raise OptionError(f"--quantization {text!r} is not JSON: {error}.") from error


@contextmanager
def described_after() -> Iterator[None]:
    """Keep a load from warning that it quantized nothing, which `describe_component` says."""
    from omniq_compile.layer_plan import NOTHING

    def says_more(record: logging.LogRecord) -> bool:
        return NOTHING not in record.getMessage()

    logger = logging.getLogger("omniq")
    logger.addFilter(says_more)
    try:
        yield
    finally:
        logger.removeFilter(says_more)


def describe_component(name: str, model: nn.Module, options: Mapping[str, Any]) -> tuple[str, bool]:
    """Word what became of a loaded component's layers, and say whether any is quantized."""
    from omniq_compile.layer_plan import describe, plan_of_quantized, why_kept

    config = QuantConfig.from_options(options)
    rows = plan_of_quantized(model, config)
    if any(row.method is not None for row in rows):
        return f"{name}: {describe(rows, config.method)}", True
    return f"{name}: no layer is quantized to {config.method}: {why_kept(rows)}", False
