"""``omniq``: one file a command, each with ``add_arguments(parser)`` and ``run(arguments)``."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from omniq_compile import __version__
from omniq_compile.checkpoints.whole_file import is_of_no_room
from omniq_compile.lowering.errors import OmniqError

COMMANDS = {
    "dump": "show what the backend does to a model, stage by stage",
    "plan": "show what becomes of a model of any size, from its configuration alone",
    "bench": "measure a model beside Inductor BF16 and torchao",
    "generate": "run a diffusers pipeline with quantized components",
    "compare": "measure a pipeline's pictures beside those of BF16, and pass or fail",
    "tune": "find the layers to keep in BF16 for a quality or a size",
    "quantize": "write a quantized checkpoint",
    "kernels": "list the kernels of every target, and what this machine has",
}


# Diffusers imports torchao where it is installed, which then warns of parts that only `bench` uses.
TALK_OF_TORCHAO = (
    "torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # It repeats what it does not know: after a misspelt --token that is a token.
        super().error(re.sub(r"\bhf_\w+", "hf_...", message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = " ".join(["omniq", *(name for name in arguments[:1] if name in COMMANDS)])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name of the user's that the terminal has no letters for is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:  # as where the shell closed it
                sys.stdout.flush()
    except OmniqError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read it has seen enough, as `| head` has.
        _drop_output()
        return 1
    except OSError as error:
        if not is_of_no_room(error):
            raise
        _drop_output()
        print(f"{command}: error: {error}. Make room, or write elsewhere.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130  # as a shell reports SIGINT


def _drop_output() -> None:
    """Let go of what could not be printed, or Python would fail again as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="omniq", description="A torch.compile backend that quantizes diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=f"omniq {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    if arguments[:1] != ["bench"]:
        for name in TALK_OF_TORCHAO:
            logging.getLogger(name).setLevel(logging.ERROR)
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text)
        # Only the command that is called is imported, so that the others cost nothing.
        if name in arguments[:1]:
            import_module(f"omniq_compile.cli.{name}").add_arguments(sub)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        hint = _hint(unknown) if hasattr(parsed, "quantization") else ""
        command = subparsers.choices[parsed.command]
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if hasattr(parsed, "folder"):
        from omniq_compile.checkpoints.hub_download import existing_folder

        existing_folder(parsed.folder)  # before diffusers is imported, which takes seconds
    return int(import_module(f"omniq_compile.cli.{parsed.command}").run(parsed))


def _hint(unknown: Sequence[str]) -> str:
    """Say where an option of a method goes, for which other commands have arguments."""
    from omniq_compile.passes.config import QuantConfig

    named = (word.partition("=")[0].lstrip("-").replace("-", "_") for word in unknown)
    option = next((name for name in named if name in QuantConfig.__dataclass_fields__), None)
    if option is None:
        return ""
    example = f'{{"transformer": {{"method": "int8", "{option}": ...}}}}'
    return f". An option of a method stands in --quantization '{example}'."
