"""``omniq quantize``: write a quantized checkpoint, which loads again in seconds."""

from __future__ import annotations

import argparse
import gc
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from omniq_compile.checkpoints.variant_files import copy_as_plain, is_of_weights
from omniq_compile.checkpoints.written_folder import MODEL, PIPELINE, check_place, write_aside
from omniq_compile.cli.loading_arguments import (
    add_dtype_argument,
    add_hub_arguments,
    add_variant_argument,
    loading_arguments,
)
from omniq_compile.cli.quantization import (
    add_quantization_argument,
    describe_component,
    described_after,
    read_quantization,
)
from omniq_compile.lowering.errors import OptionError
from omniq_compile.pipelines.components import PipelineQuantConfig, build_quant_config

# Options that change no number, so that a set found by `omniq tune` may have them.
OF_A_RUN = ("compiler", "inductor", "mode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", help="a diffusers pipeline or model, or a hub id")
    add_quantization_argument(parser)
    add_variant_argument(parser)
    add_hub_arguments(parser)
    add_dtype_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="the folder to make")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the pipeline or model that --out holds"
    )


def run(arguments: argparse.Namespace) -> int:
    """Quantize one component after the other, and copy the rest."""
    # Late, here and below: diffusers takes seconds to import, which --help need not wait for.
    from omniq_compile.checkpoints.checkpoint_folder import pipeline_components
    from omniq_compile.checkpoints.hub_download import (
        described_folder,
        hub_arguments,
        whole_folder,
    )
    from omniq_compile.checkpoints.recorded_options import refuse_unstored

    config = build_quant_config(read_quantization(arguments.quantization))
    console = Console(stderr=True)
    given = {name for options in config.chosen for name in options}
    refuse_unstored(sorted(given.difference(OF_A_RUN)), "omniq generate, in its --quantization")
    if of_a_run := given.intersection(OF_A_RUN):
        names = ", ".join(sorted(of_a_run))
        console.print(f"not stored, as they say how a model is run: {names}", soft_wrap=True)
    loading = loading_arguments(arguments)
    variant = loading.pop("variant", None)
    hub = hub_arguments(loading)
    loading = {name: value for name, value in loading.items() if name not in hub}
    # What can be wrong is found out before weights are downloaded.
    described = described_folder(arguments.folder, hub)
    kind = PIPELINE if (described / PIPELINE).is_file() else MODEL
    if kind == PIPELINE:
        config.check_names(pipeline_components(described))
    elif config.everywhere is None:
        raise OptionError(
            f"{arguments.folder} is one model, not a pipeline: give a method, such as int8."
        )
    _check_apart(described, arguments.out)
    check_place(arguments.out, kind, overwrite=arguments.overwrite)
    source = whole_folder(arguments.folder, hub, variant=variant)
    quantized = partial(
        _quantize_pipeline if kind == PIPELINE else _quantize_model,
        _Work(source, config, variant, loading, console),
    )
    write_aside(arguments.out, quantized, kind, overwrite=arguments.overwrite)
    console.print(f"wrote {arguments.out}", soft_wrap=True, markup=False)
    return 0


@dataclass(frozen=True)
class _Work:
    """What is quantized.

    Attributes:
        source: the folder of a pipeline or a model.
        config: how to quantize it.
        variant: of the weights, where one was named.
        loading: further arguments of a load.
        console: to print on.
    """

    source: Path
    config: PipelineQuantConfig
    variant: str | None
    loading: Mapping[str, Any]
    console: Console


def _quantize_model(work: _Work, folder: Path) -> None:
    from omniq_compile.checkpoints.loading import load_model
    from omniq_compile.pipelines.call import loading_worded

    options = work.config.everywhere
    assert options is not None
    with loading_worded(work.source), described_after():
        model: Any = load_model(work.source, options=options, variant=work.variant, **work.loading)
    line, some = describe_component(str(work.source), model, options)
    if not some:
        raise OptionError(
            f"{line}. Change that option, as in --quantization "
            '\'{"method": "...", "min_features": 1}\'.'
        )
    work.console.print(line, soft_wrap=True, markup=False)
    model.save_pretrained(folder)


def _quantize_pipeline(work: _Work, folder: Path) -> None:
    from omniq_compile.pipelines.call import loading_worded
    from omniq_compile.pipelines.from_pretrained import check_components, components_with

    with loading_worded(work.source):
        components = check_components(work.source, work.config)
    with_variant = components_with(work.variant, work.source, components)
    chosen = [name for name in components if work.config.options_for(name) is not None]
    for entry in work.source.iterdir():
        if entry.name in chosen or _is_beside(entry):
            continue
        if work.variant is not None and entry.name in with_variant:
            copy_as_plain(entry, folder / entry.name, work.variant)
        else:
            copy = shutil.copytree if entry.is_dir() else shutil.copy2
            copy(entry, folder / entry.name)
    some = False
    for name in chosen:
        variant = work.variant if name in with_variant else None
        some |= _quantize_component(work, components[name], name, variant, folder / name)
        # A model of transformers is part of a reference cycle.
        gc.collect()
    if not some:
        raise OptionError(
            f"no layer of {work.source} is quantized, and nothing is written. Name components "
            f"that have some to quantize: it has {', '.join(components)}."
        )


def _quantize_component(
    work: _Work, kind: tuple[str, str], name: str, variant: str | None, folder: Path
) -> bool:
    """Write one component, and let go of it; returns whether a layer of it is quantized."""
    from omniq_compile.checkpoints.recorded_options import stored_options
    from omniq_compile.pipelines.call import loading_worded
    from omniq_compile.pipelines.from_pretrained import is_own, load_component

    source, config = work.source / name, work.config
    options = config.options_for(name, is_stored=is_own(source))
    with loading_worded(source), described_after():
        model = load_component(*kind, source, options=options, variant=variant, **work.loading)
    shown = stored_options(model) or config.options_for(name)
    assert shown is not None
    line, some = describe_component(name, model, shown)
    # Where `default` stands for it, a component that has nothing to quantize may.
    asked = config.everywhere is not None or name in config.components
    if asked and not some:
        raise OptionError(
            f"{line}. Change that option, as in --quantization "
            f'\'{{"{name}": {{"method": "...", "min_features": 1}}}}\', '
            "or leave the component out."
        )
    work.console.print(line, soft_wrap=True, markup=False)
    model.save_pretrained(folder)
    _copy_rest(source, folder)
    return some


def _check_apart(source: Path, out: Path) -> None:
    """Refuse an --out that would replace what is read, or that would be copied into itself.

    Raises:
        OptionError: one is the other, or lies inside it.
    """
    # A component's folder may be a link to where its weights really are.
    read = {folder.resolve() for folder in (source, *source.iterdir()) if folder.is_dir()}
    made = out.resolve()
    for folder in read:
        if made == folder or made in folder.parents or folder in made.parents:
            raise OptionError(
                f"--out {out} and {folder}, which is read, are one folder or lie inside each "
                "other, so the original would be lost. Choose a folder beside it."
            )


def _is_beside(entry: Path) -> bool:
    """Say whether an entry of a pipeline's folder is no part of the pipeline.

    Such as `.git`, or all weights once more in a single file.
    """
    return entry.name.startswith(".") or (entry.is_file() and is_of_weights(entry.name))


def _copy_rest(source: Path, folder: Path) -> None:
    """Copy what a component has beside its weights, such as a generation config."""
    for entry in source.iterdir():
        if entry.is_file() and not is_of_weights(entry.name) and not (folder / entry.name).exists():
            shutil.copy2(entry, folder / entry.name)
