"""Models of FAMILIES with random weights, and random inputs for any model of FAMILIES."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from omniq_compile.checkpoints.filling import is_inside
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.models.families import (
    InputSize,
    family_of,
    preset_config,
    transformer_class,
)


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
    family = family_of(type(model).__name__)
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
    # What a constructor would draw is drawn anew, and takes longer than all else here.
    from diffusers.models.modeling_utils import no_init_weights

    config = preset_config(class_name, preset, width, num_blocks)
    # Some still draw from the global generator, whose state belongs to the caller.
    with torch.random.fork_rng(devices=[]), no_init_weights():
        model: nn.Module = transformer_class(class_name)(**config)
    _redraw(model, dtype, seed)
    return model.eval().requires_grad_(False)


def _redraw(model: nn.Module, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    in_float32 = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            std = parameter[0].numel() ** -0.5
            value = torch.randn(parameter.shape, generator=generator).mul_(std)
        elif name.endswith("weight"):
            value = torch.ones(parameter.shape)
        else:
            value = torch.randn(parameter.shape, generator=generator).mul_(0.1)
        parameter.data = value if is_inside(name, in_float32) else value.to(dtype)
