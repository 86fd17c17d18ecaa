"""Finds the model that a command's MODEL argument names, and inputs to call it with.

MODEL is one of

    a diffusers folder       ./Qwen-Image, or the transformer/ folder inside it
    Class[:preset]           QwenImageTransformer2DModel:tiny, with random weights
    module:function          a function of yours that returns (model, inputs)
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import pkgutil
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omniq_compile.cli.families import FAMILIES, PRESETS, Family, InputSize
from omniq_compile.lowering.errors import OmniqError, OptionError, hint, unknown


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, without gradients, and what to call it with."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    args: tuple[Any, ...] = field(default=())

    def run(self) -> Any:
        """Call the model as it stands and return its output."""
        return self.model(*self.args, **self.inputs)


def make_inputs(
    model: nn.Module,
    *,
    image_tokens: int,
    text_tokens: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw the keyword arguments of `model.forward` for one denoising step.

    Works for every class in FAMILIES at any width: sizes are read from `model.config`. The image
    is a rectangle of `image_tokens` tokens, as square as they allow. Tensors are on the CPU;
    latents and text are standard normal in `dtype`.

    Raises:
        OmniqError: the class is not in FAMILIES, or `image_tokens` only makes a thin strip.
    """
    family = _family(type(model).__name__)
    if image_tokens < 1 or text_tokens < 1 or batch < 1:
        raise OmniqError(
            "image_tokens, text_tokens and batch must each be at least 1, "
            f"got {image_tokens}, {text_tokens} and {batch}"
        )
    rows = next(n for n in range(math.isqrt(image_tokens), 0, -1) if image_tokens % n == 0)
    columns = image_tokens // rows
    # The rotary tables of Z-Image end at 512 positions a side.
    if columns > 512:
        raise OmniqError(
            f"image_tokens={image_tokens} makes a {rows} x {columns} image, too long for rotary "
            f"embeddings; take a square, such as {math.isqrt(image_tokens) ** 2}"
        )
    # Not the seed itself: the inputs would repeat the numbers that `random_model` drew for weights.
    generator = torch.Generator().manual_seed(seed + 1)
    return family.inputs(model, InputSize(batch, (rows, columns), text_tokens, dtype, generator))


def random_model(
    class_name: str,
    preset: str = "block",
    *,
    width: int | None = None,
    num_blocks: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> nn.Module:
    """Build a class of FAMILIES with random weights, on the CPU, in eval mode.

    Matrices are normal with standard deviation 1/sqrt(fan-in), biases with 0.1, and norms are 1,
    so that activations stay of order 1 and no branch is dead. `width` and `num_blocks` replace
    the preset's; heads are 128 wide where that divides the width, else 32. Parameters that
    diffusers keeps in float32 on loading are float32 here too.

    Raises:
        OmniqError: an unknown class or preset, or a width that is not a multiple of 32.
    """
    config = preset_config(class_name, preset, width, num_blocks)
    # The constructor draws from the global generator, whose state belongs to the caller.
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = _diffusers_class(class_name)(**config)
    _redraw(model, dtype, seed)
    return _frozen(model)


def preset_config(
    class_name: str, preset: str, width: int | None = None, num_blocks: int | None = None
) -> dict[str, Any]:
    """Return the arguments of a class of FAMILIES that make the model of `random_model`.

    Raises:
        OmniqError: an unknown class or preset, or a width that is not a multiple of 32.
    """
    family = _family(class_name)
    if preset not in PRESETS:
        raise OmniqError(unknown("preset", preset, PRESETS))
    if width is None:
        width = PRESETS[preset].width or family.width
    if num_blocks is None:
        num_blocks = PRESETS[preset].num_blocks
    if width < 64 or width % 32:
        raise OmniqError(f"width {width}: {class_name} needs a multiple of 32, at least 64")
    if num_blocks < 1:
        raise OmniqError(f"num_blocks {num_blocks}: {class_name} needs at least 1")
    return family.config(width, 128 if width % 128 == 0 else 32, num_blocks)


def preset_of(text: str) -> tuple[str, str] | None:
    """Read ``Class[:preset]`` of a class of FAMILIES; None where the text is no such thing."""
    class_name, colon, preset = text.rpartition(":")
    if text in FAMILIES:
        return text, "tiny"
    return (class_name, preset) if colon and class_name in FAMILIES else None


def resolve(
    text: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    image_tokens: int | None = None,
    text_tokens: int | None = None,
) -> LoadedModel:
    """Find the model that ``text`` names (see the head of this file) and inputs for it.

    `dtype`, `seed` and the token counts hold for folders and presets; the counts default to the
    preset's, for a folder to those of "tiny". What a `module:function` returns is taken as it is.

    Raises:
        OmniqError: nothing of that name, listing what there is and the nearest name; or loading
            it failed, with the cause chained.
    """
    left, colon, right = text.rpartition(":")
    if Path(text).is_dir():
        model, preset = _load_folder(Path(text), dtype), "tiny"
    elif (named := preset_of(text)) is not None:
        class_name, preset = named
        model = random_model(class_name, preset, dtype=dtype, seed=seed)
    elif not colon or _is_class_name(left):
        raise OmniqError(_not_found(left or text))
    else:
        return _call_function(text, left, right)
    inputs = make_inputs(
        model,
        image_tokens=image_tokens or PRESETS[preset].image_tokens,
        text_tokens=text_tokens or PRESETS[preset].text_tokens,
        dtype=dtype,
        seed=seed,
    )
    return LoadedModel(text, model, inputs)


def _redraw(model: nn.Module, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    in_float32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            std = parameter[0].numel() ** -0.5
            value = torch.randn(parameter.shape, generator=generator).mul_(std)
        elif name.endswith("weight"):
            value = torch.ones(parameter.shape)
        else:
            value = torch.randn(parameter.shape, generator=generator).mul_(0.1)
        keep = not in_float32.isdisjoint(name.split("."))
        parameter.data = value if keep else value.to(dtype)


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def _load_folder(folder: Path, dtype: torch.dtype) -> nn.Module:
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    config = folder / "config.json"
    if not config.is_file():
        raise OmniqError(
            f"{folder} has no config.json: give a diffusers pipeline folder (with "
            "model_index.json and transformer/) or a transformer's own folder"
        )
    try:
        class_name = json.loads(config.read_text(encoding="utf-8")).get("_class_name", "")
    except ValueError as error:
        raise OmniqError(f"{config} is not valid JSON: {error}") from error
    _family(class_name)
    from omniq_compile.load_arguments import DTYPE_KEYWORD  # needs diffusers

    try:
        model: nn.Module = _diffusers_class(class_name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, **{DTYPE_KEYWORD: dtype}
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise OmniqError(f"diffusers cannot load {class_name} from {folder}: {error}") from error
    return _frozen(model)


def _call_function(text: str, module_name: str, function_name: str) -> LoadedModel:
    # As `python -m` has it: the user's own files come first.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise OmniqError(_own_traceback(f"importing {module_name}", error)) from error
        here = [m.name for m in pkgutil.iter_modules([os.getcwd()])]
        raise OmniqError(unknown("module", module_name, here)) from error
    except Exception as error:
        raise OmniqError(_own_traceback(f"importing {module_name}", error)) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise OmniqError(unknown(f"function in module {module_name}", function_name, names))
    try:
        result = function()
    except Exception as error:
        raise OmniqError(_own_traceback(f"{text} raised; calling it", error)) from error
    match result:
        case (nn.Module() as model, dict() as inputs):
            return LoadedModel(text, _frozen(model), inputs)
        case (nn.Module() as model, tuple() as args):
            return LoadedModel(text, _frozen(model), {}, args)
    raise OmniqError(
        f"{text} must return (model, inputs): an nn.Module, and a dict of keyword arguments or a "
        f"tuple of arguments; it returned {_describe(result)}"
    )


def _describe(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


def _own_traceback(doing: str, error: Exception) -> str:
    # The first frame is this file's.
    first = error.__traceback__.tb_next if error.__traceback__ else None
    trace = "".join(traceback.format_exception(type(error), error, first)).rstrip()
    return f"{doing} raised {type(error).__name__}:\n{trace}"


def _family(class_name: str) -> Family:
    if class_name not in FAMILIES:
        raise OptionError(unknown("transformer class", class_name, FAMILIES))
    return FAMILIES[class_name]


def _diffusers_class(class_name: str) -> Any:
    # Imported late: `omniq --help` should not wait for diffusers.
    found = getattr(importlib.import_module("diffusers"), class_name, None)
    if found is None:
        raise OmniqError(f"the installed diffusers has no {class_name}: upgrade diffusers")
    return found


def _is_class_name(name: str) -> bool:
    """Whether NAME in NAME:something is meant for a class and not for a module."""
    return name[:1].isupper() and "." not in name


def _not_found(name: str) -> str:
    if os.sep in name or name.startswith("."):
        folders = [str(p) for p in Path(name).parent.glob("*/")]
        return f"no folder {name}.{hint(name, folders)}"
    return (
        f"no folder {name} here, and {unknown('transformer class', name, FAMILIES)} "
        f"Write Class:preset with preset {' or '.join(PRESETS)}, or module:function for a "
        "function that returns (model, inputs)."
    )
