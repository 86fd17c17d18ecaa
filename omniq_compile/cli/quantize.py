"""``omniq quantize``: write a quantized checkpoint, which loads again in seconds."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from omniq_compile.cli.quantization import add_quantization_argument, read_quantization
from omniq_compile.components import build_quant_config
from omniq_compile.lowering.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", help="a diffusers pipeline or model, or a hub id")
    add_quantization_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="the folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def run(arguments: argparse.Namespace) -> int:
    """Quantize one component after the other, and copy the rest."""
    from omniq_compile.loading import load_model, local_folder
    from omniq_compile.saving import save_model, write_aside

    source = local_folder(arguments.folder)
    quantization = read_quantization(arguments.quantization)
    console = Console(stderr=True)
    if (source / "model_index.json").is_file():
        todo = _components(source, quantization)

        def write(folder: Path) -> None:
            for entry in source.iterdir():
                if entry.name not in todo:
                    copy = shutil.copytree if entry.is_dir() else shutil.copy2
                    copy(entry, folder / entry.name)
            for name, options in todo.items():
                console.print(f"{name}: {options['method']}")
                model: Any = load_model(source / name, options=options)
                model.save_pretrained(folder / name)

        write_aside(arguments.out, write, overwrite=arguments.overwrite)
    else:
        options = build_quant_config(quantization).everywhere
        if options is None:
            raise OptionError(
                f"{source} is one model, not a pipeline: give a method, such as int8."
            )
        model = load_model(source, options=options)
        save_model(model, arguments.out, overwrite=arguments.overwrite)
    console.print(f"wrote {arguments.out}")
    return 0


def _components(source: Path, quantization: Any) -> dict[str, dict[str, Any]]:
    from omniq_compile.pipeline import check_components

    config = build_quant_config(quantization)
    components = check_components(source, config)
    todo = {}
    for name, (library, _) in components.items():
        options = config.options_for(name)
        if options is not None and library != "diffusers":
            raise OptionError(
                f"{name!r} is a model of {library!r}, which omniq quantizes while loading but does "
                f"not save. Leave it out here, and load with quantization={{{name!r}: ...}}."
            )
        if options is not None:
            todo[name] = options
    return todo
