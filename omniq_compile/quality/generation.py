"""Runs a diffusers pipeline for one seed, and keeps its pictures, latents and time."""

from __future__ import annotations

import gc
import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from omniq_compile.compiling.denoise import denoise_step
from omniq_compile.lowering.errors import OmniqError, OptionError
from omniq_compile.memory import release_unused
from omniq_compile.pipelines.call import CALLBACK, call_worded
from omniq_compile.pipelines.output import made_by

Pictures = npt.NDArray[np.float32]

# A pipeline is warmed up with as few steps as schedulers take: some divide by their number less 1.
WARM_UP_STEPS = 2

# Of a range of seeds: more is a slip of the finger, and not days of work.
MOST_SEEDS = 100_000


@dataclass(frozen=True)
class Generation:
    """What one seed gave.

    Attributes:
        pictures: float32 ``[n, H, W, C]`` from 0 to 1: images, or the frames of videos.
        latents: after each denoising step, on the CPU; empty where the pipeline reports none.
        seconds: of the pipeline's call.
    """

    pictures: Pictures
    latents: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0


def generate(
    pipe: Any,
    arguments: Mapping[str, Any],
    seed: int,
    on_step: Callable[[int], None] | None = None,
    *,
    keep_latents: bool = True,
) -> Generation:
    """Call a pipeline once, and follow its denoising steps where it reports them.

    Args:
        pipe: a diffusers pipeline.
        arguments: of its call, without generator, callback and output type.
        seed: of a generator on the CPU, which gives the same noise on every device.
        on_step: called with the number of steps that are done.
        keep_latents: copy the latents of every step.

    Raises:
        OmniqError: it refused the arguments, or returned no pictures.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    given = dict(arguments)
    given["generator"] = torch.Generator().manual_seed(seed)
    if "output_type" in accepted:
        given.setdefault("output_type", "np")
    latents: list[torch.Tensor] = []
    with denoise_step(0) as publish:

        def step_end(
            pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]
        ) -> dict[str, Any]:
            if keep_latents and isinstance(kwargs.get("latents"), torch.Tensor):
                latents.append(kwargs["latents"].detach().to("cpu", copy=True))
            if on_step is not None:
                on_step(step + 1)
            return publish(pipeline, step, timestep, kwargs)

        if CALLBACK in accepted:
            given[CALLBACK] = step_end
        start = time.perf_counter()
        result = call_worded(pipe, given)
        seconds = time.perf_counter() - start
    return Generation(pictures_of(result), latents, seconds)


def warm_up(pipe: Any, arguments: Mapping[str, Any], seed: int) -> float:
    """Call a pipeline so that everything is compiled; returns the seconds that took."""
    given = dict(arguments)
    accepted = inspect.signature(pipe.__call__).parameters
    if "num_inference_steps" in accepted:
        steps = WARM_UP_STEPS
        # Of the steps of a pipeline that begins with a picture only this share is made.
        strength = given.get(
            "strength", accepted["strength"].default if "strength" in accepted else 1
        )
        if isinstance(strength, (int, float)) and 0 < strength < 1:
            steps = math.ceil(steps / strength)
        given["num_inference_steps"] = min(steps, given.get("num_inference_steps", steps))
    return generate(pipe, given, seed, keep_latents=False).seconds


def pictures_of(result: Any) -> Pictures:
    """Return what a pipeline made as float32 ``[n, H, W, C]``; the frames of videos in a row.

    Raises:
        OmniqError: it made neither pictures nor videos.
    """
    made = made_by(result)
    array = _array(made.batch)
    if made.videos and array.ndim < 4:
        raise OmniqError(f"frames of shape {list(array.shape)} are no videos.")
    # Pipelines of layers return those of each picture, as others do the frames of each video.
    if made.videos or array.ndim == 5:
        array = array.reshape(-1, *array.shape[2:])
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4:
        raise OmniqError(f"the pipeline returned pictures of shape {list(array.shape)}.")
    # Tensors have their channels first.
    if array.shape[-1] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = np.moveaxis(array, 1, -1)
    return array


def _array(made: Any) -> Pictures:
    if isinstance(made, torch.Tensor):
        return made.detach().float().cpu().numpy()
    if isinstance(made, (list, tuple)):
        return np.stack([_array(one) for one in made])
    array = np.asarray(made)
    scale = 255 if array.dtype == np.uint8 else 1
    return array.astype(np.float32) / np.float32(scale)


def parse_seeds(text: str) -> list[int]:
    """Read seeds such as ``0-7`` or ``3,10-12``.

    Raises:
        OptionError: it is not that, or names a seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise OptionError(
                f"--seeds {text!r}: {part.strip()!r} is neither a seed nor a range of seeds. "
                "Write for example 0-7 or 3,10-12."
            )
        end = int(last) if dash else int(first)
        if end < int(first):
            raise OptionError(f"--seeds {text!r}: the range {part.strip()!r} runs backwards.")
        if end - int(first) >= MOST_SEEDS:
            raise OptionError(
                f"--seeds {text!r}: {part.strip()!r} are more than {MOST_SEEDS} pictures."
            )
        seeds.extend(range(int(first), end + 1))
    if len(set(seeds)) < len(seeds):
        raise OptionError(f"--seeds {text!r} names a seed twice.")
    if max(seeds) >= 1 << 63:
        raise OptionError(f"--seeds {text!r}: a seed is below 2**63.")
    return seeds


def release(device: torch.device) -> None:
    """Give back what a pipeline that is no longer referenced held, compiled code included."""
    torch.compiler.reset()
    gc.collect()
    release_unused(device)
