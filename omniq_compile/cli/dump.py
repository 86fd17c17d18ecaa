"""``omniq dump MODEL --method int8``: what the backend does to a model."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from omniq_compile.cli.loading_arguments import add_hub_arguments, downloading_arguments
from omniq_compile.cli.once import Once
from omniq_compile.cli.options import add_option_arguments, options_of
from omniq_compile.inspector.document import render_json
from omniq_compile.inspector.drawing import render_svg
from omniq_compile.inspector.inspection import Inspection, inspect
from omniq_compile.inspector.page import render_page
from omniq_compile.inspector.text import KERNELS, part_title, render, render_diff
from omniq_compile.lowering.errors import OptionError
from omniq_compile.output_file import check_writable, write
from omniq_compile.passes.legal import STAGES

FORMATS = ("text", "html", "svg", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a diffusers folder, a hub id, a transformer's config.json, a class with a size "
        "(QwenImageTransformer2DModel:tiny), or module:function that returns a model and its "
        "inputs",
    )
    add_hub_arguments(parser)
    add_option_arguments(parser)
    parser.add_argument("--target", help="lower for this target, present or not (cpu:avx512_vnni)")
    parser.add_argument(
        "--stage",
        nargs="+",
        action="extend",
        choices=(*STAGES, KERNELS),
        help="what to show (default: traced quantized); kernels is the generated code",
    )
    parser.add_argument(
        "--layer",
        action=Once,
        metavar="PATTERN",
        help="only these layers and what feeds them, such as img_mlp",
    )
    parser.add_argument(
        "--diff", action="store_true", help="show what changes between two stages, for each block"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there, not to the terminal")


def run(arguments: argparse.Namespace) -> int:
    """Trace the model, and show it."""
    from omniq_compile.models.argument import find_model  # late, as it imports diffusers

    stages = _stages(arguments)
    check_writable("--out", arguments.out)
    hub = downloading_arguments(arguments, arguments.model)
    kernels = KERNELS in stages or arguments.format == "html"
    # What a model prints while it is traced is no part of the result.
    with contextlib.redirect_stdout(sys.stderr):
        loaded = find_model(arguments.model, hub=hub)
        inspection = inspect(
            loaded.name,
            loaded.model,
            loaded.args or loaded.inputs,
            options_of(arguments),
            target=arguments.target,
            layer=arguments.layer,
            stages=_printed(stages, arguments.format),
            whole=arguments.format == "json",
            kernels=kernels,
        )
    text = _rendered(inspection, stages, arguments)
    if arguments.out is None:
        sys.stdout.write(_coloured(text, arguments))
    else:
        write("--out", arguments.out, text)
    failed = [part for part in inspection.parts if part.no_kernels is not None]
    for part in failed:
        first = str(part.no_kernels).partition("\n")[0]
        print(f"omniq dump: stage kernels of {part_title(part)}: {first}", file=sys.stderr)
    return 1 if failed and KERNELS in stages else 0


def _printed(stages: list[str], format: str) -> list[str]:
    """Return the stages that a format shows, in order; that of kernels may show the lowered."""
    if format in ("html", "json"):
        return list(STAGES)
    return [s for s in STAGES if s in stages or (s == "lowered" and KERNELS in stages)]


def _rendered(inspection: Inspection, stages: list[str], arguments: argparse.Namespace) -> str:
    if arguments.format == "html":
        return render_page(inspection)
    if arguments.format == "svg":
        return render_svg(inspection, *stages)
    if arguments.format == "json":
        return render_json(inspection)
    if arguments.diff:
        return render_diff(inspection, *stages)
    return render(inspection, stages)


def _stages(arguments: argparse.Namespace) -> list[str]:
    """Return the stages to show, two of them for a difference."""
    given, format = arguments.stage, arguments.format
    if format != "text" and arguments.diff:
        raise OptionError(f"--diff is for --format text; --format {format} does not take it.")
    if format == "svg" and given not in (None, ["traced"], ["quantized"]):
        raise OptionError(
            f"--format svg draws one stage, traced or quantized, and not {' and '.join(given)}. "
            "Take --format text or html for the others."
        )
    if not arguments.diff:
        if format == "svg":
            return given or ["quantized"]
        return given or ["traced", "quantized"]
    stages = given or ["quantized"]
    stages = ["traced", *stages] if len(stages) == 1 else stages
    if KERNELS in stages or len(stages) != 2 or stages[0] == stages[1]:
        raise OptionError(
            f"--diff compares two stages of {', '.join(STAGES)}: traced with one that --stage "
            f"names, or two that it names; it cannot compare {' with '.join(stages)}."
        )
    return stages


def _coloured(text: str, arguments: argparse.Namespace) -> str:
    """Colour text for a terminal, and only there."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return text
    from pygments import highlight
    from pygments.formatters import TerminalFormatter
    from pygments.lexers import get_lexer_by_name

    name = "diff" if arguments.diff else {"text": "python", "svg": "xml"}.get(arguments.format)
    lexer = get_lexer_by_name(name or arguments.format, stripnl=False)
    coloured: str = highlight(text, lexer, TerminalFormatter())
    return coloured
