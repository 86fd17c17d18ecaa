"""A diffusers pipeline's call, from its arguments and compiling to the wording of its refusals."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from traceback import walk_tb
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import import_utils
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

import omniq_compile
from omniq_compile.backend import omniq
from omniq_compile.checkpoints.hub_download import hub_arguments, index_folder
from omniq_compile.compiling.block_parts import compiled_parts
from omniq_compile.compiling.own_backend import own_backend
from omniq_compile.compiling.own_errors import own_errors
from omniq_compile.compiling.regional import compile
from omniq_compile.lowering.errors import OmniqError, OptionError, unknown
from omniq_compile.model_blocks import module_blocks
from omniq_compile.passes.config import QuantConfig
from omniq_compile.pipelines.components import PipelineQuantConfig
from omniq_compile.pipelines.from_pretrained import pipeline_class
from omniq_compile.pipelines.images import (
    IMAGE,
    as_taken,
    holds_pictures,
    is_for_pictures,
    takes_pictures,
    takes_several,
    takes_tensors_only,
)
from omniq_compile.pipelines.output import check_returns

# By which a call of diffusers tells the end of each denoising step.
CALLBACK = "callback_on_step_end"


def check_call_of_folder(
    folder: str,
    given: Mapping[str, Any],
    loading: Mapping[str, Any],
    config: PipelineQuantConfig,
    *,
    sound: bool = False,
) -> type | None:
    """Check a pipeline and its arguments before its weights are downloaded or read.

    Code that the folder brings along is imported by diffusers only, so its call is checked after.

    Args:
        folder: of the pipeline, or a hub id.
        given: the arguments of its call.
        loading: those of ``from_pretrained``, some of which are for downloading.
        config: of its components.
        sound: whether a pipeline that returns sound alone will do.

    Returns:
        The class of the pipeline; None where the folder brings it along.

    Raises:
        OptionError: see `check_call`; or the pipeline returns nothing that is saved.
        CheckpointError: there is no such pipeline.
    """
    cls: type = pipeline_class(index_folder(folder, hub_arguments(loading)))
    if cls is DiffusionPipeline:
        return None
    check_returns(cls, sound=sound)
    check_call(cls, given, config)
    return cls


def check_call(pipeline: Any, given: Mapping[str, Any], config: PipelineQuantConfig) -> None:
    """Check arguments, and options that need one, against the signature of a pipeline's call.

    Raises:
        OptionError: it has no such argument, needs one that is not given, takes no picture, or
            one, where pictures are given, takes a tensor where there is none, or does not say its
            steps, which an option needs.
    """
    _, *parameters = inspect.signature(pipeline.__call__).parameters.items()  # without self
    accepted = dict(parameters)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for name, value in given.items():
        if name not in accepted and not open_ended:
            if name == IMAGE:
                raise OptionError(_no_image(pipeline, accepted))
            raise OptionError(unknown(f"argument of {pipeline.__name__}", name, accepted))
        if name in accepted and holds_pictures(value):
            _check_pictures(pipeline.__name__, accepted[name], value)
        elif name in accepted and isinstance(value, (str, list)) and value:
            _check_no_tensor(pipeline.__name__, accepted[name], value)
    if config.reads_steps and CALLBACK not in accepted:
        raise OptionError(
            f"'w4a8_fallback_steps' needs to know the denoising step, and {pipeline.__name__} does "
            f"not say it: its call takes no {CALLBACK}. Leave the option out, or name layers in "
            "'w4a8_fallback_layers'."
        )
    needed = [
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in given
    ]
    if needed:
        first = f"--argument {needed[0]}=JSON"
        if needed[0] == IMAGE or is_for_pictures(accepted[needed[0]]):
            first = f"--image {_before_file(needed[0])}FILE"
        raise OptionError(f"{pipeline.__name__} needs {' and '.join(needed)}: give {first}.")


def _no_image(pipeline: Any, accepted: Mapping[str, inspect.Parameter]) -> str:
    others = [name for name, parameter in accepted.items() if is_for_pictures(parameter)]
    if others:
        return (
            f"{pipeline.__name__} takes no {IMAGE!r}, but pictures as {', '.join(others)}: give "
            f"--image {others[0]}=FILE."
        )
    return (
        f"{pipeline.__name__} takes no image. Leave --image out, or name the folder of a pipeline "
        "that takes one, such as image to image."
    )


def _check_pictures(pipeline: str, parameter: inspect.Parameter, value: Any) -> None:
    name = parameter.name
    if not takes_pictures(parameter):
        raise OptionError(
            f"argument {name!r} of {pipeline} is no picture: give --argument {name}=JSON."
        )
    if isinstance(value, list) and not takes_several(parameter):
        what = "image" if name == IMAGE else f"picture as {name!r}"
        raise OptionError(
            f"{pipeline} takes one {what}: give a single --image {_before_file(name)}FILE."
        )


def _check_no_tensor(pipeline: str, parameter: inspect.Parameter, value: Any) -> None:
    first = value[0] if isinstance(value, list) else value
    if takes_tensors_only(parameter) and not isinstance(first, torch.Tensor):
        raise OptionError(
            f"argument {parameter.name!r} of {pipeline} is a tensor, which JSON does not have: "
            "leave it out, or call the pipeline from Python."
        )


def _before_file(name: str) -> str:
    """Return what stands before a file of ``--image`` for an argument."""
    return "" if name == IMAGE else f"{name}="


# What libraries raise at a user's mistake; an ImportError is of one that a pipeline needs.
_REFUSALS = (ValueError, TypeError, OSError, ImportError)

# And at files that are cut short, or that do not fit one another.
_UNREADABLE = (*_REFUSALS, RuntimeError, OverflowError, SafetensorError, StrictDataclassError)


@contextmanager
def refusals_worded(what: str, kinds: tuple[type[Exception], ...] = _REFUSALS) -> Iterator[None]:
    """Word what diffusers raises at a user's mistake as an error of omniq's.

    Raises:
        OmniqError: in place of an error of these kinds; the message is one line and begins with
            ``what``.
    """
    try:
        yield
    except OmniqError:
        raise
    except kinds as error:
        raise OmniqError(f"{what}: {_in_one_line(error)} ({type(error).__name__})") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def loading_worded(what: Any) -> Iterator[None]:
    """Word what is raised while something is loaded, such as "the pipeline in DIR", as one line.

    Of errors that no library means for a user, such as a KeyError at a damaged file, those of
    libraries only: out of omniq's own code it is a fault of omniq's.
    """
    what = f"{what} cannot be loaded"
    try:
        with refusals_worded(what, _UNREADABLE):
            yield
    except OmniqError:
        raise
    except Exception as error:
        *_, (innermost, _) = walk_tb(error.__traceback__)
        module = str(innermost.f_globals.get("__name__"))
        if module.startswith(omniq_compile.__name__):
            raise
        # The module tells what was being read, which such an error does not.
        kind = f"{type(error).__name__} in {module}"
        raise OmniqError(f"{what}: {_in_one_line(error)} ({kind})") from error


def load_worded(folder: str, config: Any, **loading: Any) -> Any:
    """Load a pipeline as `from_pretrained` does, with the refusals of diffusers worded."""
    with loading_worded(f"the pipeline in {folder}"):
        return omniq_compile.from_pretrained(folder, config, **loading)


def call_worded(pipe: Any, given: dict[str, Any]) -> Any:
    """Call a pipeline, with its refusals worded, and with pictures as it takes them.

    They are RGBA where its VAE reads four channels, and else RGB; one alone is a list where the
    argument takes lists alone, or is named for several.

    Raises:
        OmniqError: it refused its arguments, needs a library that is not installed, or ran out of
            memory; or omniq raised it while a component was compiled.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    mode = "RGBA" if _reads_alpha(pipe) else "RGB"
    fitting = {
        name: as_taken(value, mode, parameters.get(name)) if holds_pictures(value) else value
        for name, value in given.items()
    }
    name = type(pipe).__name__
    try:
        with refusals_worded(f"{name} refused its arguments"), own_errors():
            return pipe(**fitting)
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no class for the host's memory.
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):
            raise
        raise OmniqError(
            f"{name} ran out of memory. Draw less at once (such as height, width, num_frames or "
            f"num_images_per_prompt), or quantize more components. ({_in_one_line(error)})"
        ) from error
    except NameError as error:
        # Pipelines such as Wan's import ftfy only where it is, and call it anyway.
        is_available = getattr(import_utils, f"is_{error.name}_available", None)
        if is_available is None or is_available():
            raise
        raise OmniqError(
            f"{name} calls {error.name}, which is not installed: pip install {error.name}."
        ) from error


def _reads_alpha(pipe: Any) -> bool:
    config = getattr(getattr(pipe, "vae", None), "config", None)
    return 4 in (getattr(config, name, None) for name in ("input_channels", "in_channels"))


def compile_component(component: nn.Module, options: Mapping[str, Any] | QuantConfig) -> str:
    """Compile a component in place, by its repeated blocks where it has some.

    Returns:
        What was done, to print.
    """
    config = QuantConfig.from_options(options)
    if compiled_parts(module_blocks(component), config):
        compile(component, config)
        return "its blocks compile when they first run"
    component.compile(**own_backend(partial(omniq, options=config)))
    return "it compiles when it first runs"
