"""The transformer classes whose models and inputs the CLI can make up, one row each.

Adding a class is adding a row to FAMILIES: how to size it, and what its forward takes.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from omniq_compile.lowering.errors import OmniqError, OptionError, unknown


@dataclass(frozen=True)
class InputSize:
    """The size of the inputs to draw.

    `grid` is the image's (rows, columns) in tokens, `frames` how many of them a video has,
    `pictures` how many of one size are in the sequence: with those given to an edit, or of layers.
    Without a generator the tensors have no values, and take no memory at any size.
    """

    batch: int
    grid: tuple[int, int]
    text_tokens: int
    dtype: torch.dtype
    generator: torch.Generator | None
    frames: int = 1
    pictures: int = 1

    def normal(self, *shape: int) -> torch.Tensor:
        if self.generator is None:
            return torch.empty(shape, dtype=self.dtype, device="meta")
        # Drawn in float32 so that a seed gives the same values in every dtype.
        return torch.randn(shape, generator=self.generator).to(self.dtype)


@dataclass(frozen=True)
class Family:
    """One transformer class: its released width, and how to size it and call it.

    config(width, head_dim, num_blocks) gives the constructor's arguments, inputs(model, size)
    the keyword arguments of forward; several_pictures says whether it reads `InputSize.pictures`.
    """

    width: int
    config: Callable[[int, int, int], dict[str, Any]]
    inputs: Callable[[Any, InputSize], dict[str, Any]]
    several_pictures: bool = False


@dataclass(frozen=True)
class Preset:
    """A size that fits every family; width None is the released width."""

    width: int | None
    num_blocks: int
    image_tokens: int
    text_tokens: int


PRESETS = {
    "tiny": Preset(width=192, num_blocks=2, image_tokens=64, text_tokens=16),
    "block": Preset(width=None, num_blocks=1, image_tokens=1024, text_tokens=128),
}


# Channels of the latents of Wan2.2-TI2V-5B, whose VAE shrinks a side 16 times and not 8.
WIDE_LATENTS = 48

# A picture of 224 x 224 in patches of 14 x 14, and one token for all of it.
CLIP_TOKENS = 257

# In the four rows below the text is as wide as released, but never wider than twice the model,
# so that a narrow model is cheap in all its parts.


def _qwen_config(width: int, head_dim: int, num_blocks: int) -> dict[str, Any]:
    side = head_dim * 7 // 16
    return {
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": num_blocks,
        "joint_attention_dim": min(3584, 2 * width),
        "axes_dims_rope": (head_dim // 8, side, side),
    }


def _qwen_inputs(model: Any, size: InputSize) -> dict[str, Any]:
    config, (rows, columns) = model.config, size.grid
    inputs = {
        "hidden_states": size.normal(
            size.batch, size.pictures * rows * columns, config.in_channels
        ),
        "encoder_hidden_states": size.normal(
            size.batch, size.text_tokens, config.joint_attention_dim
        ),
        # No text mask: the pipeline drops one that masks nothing.
        "timestep": torch.full((size.batch,), 0.5, dtype=size.dtype),
        "img_shapes": [[(1, rows, columns)] * size.pictures] * size.batch,
        "return_dict": False,
    }
    # Releases of diffusers before 0.37 want the text's lengths.
    if "txt_seq_lens" in inspect.signature(model.forward).parameters:
        inputs["txt_seq_lens"] = [size.text_tokens] * size.batch
    if getattr(config, "use_additional_t_cond", False):  # of Qwen-Image-Layered: no RGB picture
        inputs["additional_t_cond"] = torch.zeros(size.batch, dtype=torch.long)
    return inputs


def _wan_config(width: int, head_dim: int, num_blocks: int) -> dict[str, Any]:
    return {
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": num_blocks,
        "text_dim": min(4096, 2 * width),
        # 2.7 times the width as in Wan 14B, in whole 64s.
        "ffn_dim": width * 27 // 640 * 64,
    }


def _wan_inputs(model: Any, size: InputSize) -> dict[str, Any]:
    config, (rows, columns) = model.config, size.grid
    frames, patch_rows, patch_columns = config.patch_size
    inputs = {
        "hidden_states": size.normal(
            size.batch,
            config.in_channels,
            frames * size.frames,
            rows * patch_rows,
            columns * patch_columns,
        ),
        # The pipeline of the wide latents gives each token a step of its own.
        "timestep": torch.full(
            (size.batch, size.frames * rows * columns)
            if config.out_channels == WIDE_LATENTS
            else (size.batch,),
            500,
        ),
        "encoder_hidden_states": size.normal(size.batch, size.text_tokens, config.text_dim),
        "return_dict": False,
    }
    if config.image_dim is not None:
        # CLIP's tokens of the first picture; with positions, which are of two, of the last one too.
        both = config.pos_embed_seq_len
        inputs["encoder_hidden_states_image"] = size.normal(
            size.batch * (2 if both else 1), both // 2 if both else CLIP_TOKENS, config.image_dim
        )
    return inputs


def _z_image_config(width: int, head_dim: int, num_blocks: int) -> dict[str, Any]:
    side = head_dim * 3 // 8
    return {
        "dim": width,
        "n_heads": width // head_dim,
        "n_kv_heads": width // head_dim,
        "n_layers": num_blocks,
        # The released model has 2; a model of one block is to be that block and nothing else.
        "n_refiner_layers": min(2, num_blocks - 1),
        "cap_feat_dim": min(2560, 2 * width),
        "axes_dims": [head_dim // 4, side, side],
    }


def _z_image_inputs(model: Any, size: InputSize) -> dict[str, Any]:
    config, (rows, columns) = model.config, size.grid
    patch, frames = config.all_patch_size[0], config.all_f_patch_size[0]
    latent = (config.in_channels, frames, rows * patch, columns * patch)
    return {
        "x": [size.normal(*latent) for _ in range(size.batch)],
        "t": torch.full((size.batch,), 0.5),
        "cap_feats": [
            size.normal(size.text_tokens, config.cap_feat_dim) for _ in range(size.batch)
        ],
        "patch_size": patch,
        "f_patch_size": frames,
        "return_dict": False,
    }


def _flux_config(width: int, head_dim: int, num_blocks: int) -> dict[str, Any]:
    side = head_dim * 7 // 16
    return {
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": num_blocks,
        "num_single_layers": num_blocks,
        "joint_attention_dim": min(4096, 2 * width),
        "guidance_embeds": True,
        "axes_dims_rope": (head_dim // 8, side, side),
    }


def _flux_inputs(model: Any, size: InputSize) -> dict[str, Any]:
    config, (rows, columns) = model.config, size.grid
    # The first coordinate tells a picture that is drawn, 0, from those that are given, 1.
    given = [min(number, 1) for number in range(size.pictures)]
    position = torch.cartesian_prod(torch.tensor(given), torch.arange(rows), torch.arange(columns))
    inputs = {
        "hidden_states": size.normal(
            size.batch, size.pictures * rows * columns, config.in_channels
        ),
        "encoder_hidden_states": size.normal(
            size.batch, size.text_tokens, config.joint_attention_dim
        ),
        "pooled_projections": size.normal(size.batch, config.pooled_projection_dim),
        "timestep": torch.full((size.batch,), 0.5, dtype=size.dtype),
        "img_ids": position.to(size.dtype),
        "txt_ids": torch.zeros(size.text_tokens, 3, dtype=size.dtype),
        "return_dict": False,
    }
    if config.guidance_embeds:
        # The model rounds 1000 times this to its dtype: 3500 is not a BF16 number, 4000 is.
        inputs["guidance"] = torch.full((size.batch,), 4.0)
    return inputs


FAMILIES = {
    "QwenImageTransformer2DModel": Family(3072, _qwen_config, _qwen_inputs, several_pictures=True),
    "WanTransformer3DModel": Family(5120, _wan_config, _wan_inputs),
    "ZImageTransformer2DModel": Family(3840, _z_image_config, _z_image_inputs),
    "FluxTransformer2DModel": Family(3072, _flux_config, _flux_inputs, several_pictures=True),
}


def family_of(class_name: str) -> Family:
    """Return the row of a class.

    Raises:
        OptionError: there is none.
    """
    if class_name not in FAMILIES:
        raise OptionError(unknown("transformer class", class_name, FAMILIES))
    return FAMILIES[class_name]


def transformer_class(class_name: str) -> Any:
    """Return a class of FAMILIES itself.

    Raises:
        OmniqError: the installed diffusers is older than it.
    """
    # Imported late: `omniq --help` should not wait for diffusers.
    found = getattr(importlib.import_module("diffusers"), class_name, None)
    if found is None:
        raise OmniqError(f"the installed diffusers has no {class_name}: upgrade diffusers")
    return found


def preset_config(
    class_name: str, preset: str, width: int | None = None, num_blocks: int | None = None
) -> dict[str, Any]:
    """Return the arguments of a class of FAMILIES that make the model of `random_model`.

    Raises:
        OmniqError: an unknown class or preset, or a width that is not a multiple of 32.
    """
    family = family_of(class_name)
    if preset not in PRESETS:
        raise OptionError(unknown("preset", preset, PRESETS))
    if width is None:
        width = PRESETS[preset].width or family.width
    if num_blocks is None:
        num_blocks = PRESETS[preset].num_blocks
    if width < 64 or width % 32:
        raise OmniqError(f"width {width}: {class_name} needs a multiple of 32, at least 64")
    if num_blocks < 1:
        raise OmniqError(f"num_blocks {num_blocks}: {class_name} needs at least 1")
    return family.config(width, 128 if width % 128 == 0 else 32, num_blocks)
