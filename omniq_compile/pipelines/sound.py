"""The sound that a diffusers pipeline made, alone or beside its videos, and its sampling rate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from omniq_compile.lowering.errors import OmniqError
from omniq_compile.pipelines.output import SOUNDS

# Where pipelines of diffusers 0.42 say it; the first that one has is that of what it returns.
SAMPLING_RATES = (
    "vocoder.config.output_sampling_rate",  # LTX-2, whose audio_vae has that of its spectrograms
    "vocoder.config.sampling_rate",  # AudioLDM 2, MusicLDM
    "sound_tokenizer.config.sampling_rate",  # Cosmos 3
    "audio_vae.config.sample_rate",  # Kandinsky 6
    "vae.config.sampling_rate",  # Stable Audio, ACE-Step
    "vae.config.sample_rate",  # LongCat-AudioDiT
    "unet.config.sample_rate",  # Dance Diffusion
)


@dataclass(frozen=True)
class Sound:
    """A batch of sounds.

    Attributes:
        waves: float32 ``[samples, channels]`` each, from -1 to 1.
        sampling_rate: samples a second.
    """

    waves: list[npt.NDArray[np.float32]]
    sampling_rate: int


def has_sound(result: Any) -> bool:
    """Say whether a pipeline's result has sound."""
    return _samples(result) is not None


def sound_of(pipe: Any, result: Any) -> Sound:
    """Return the sound that a pipeline returned.

    Raises:
        OmniqError: nothing of the pipeline says the sampling rate.
    """
    samples = _samples(result)
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().float().cpu().numpy()
    batch = np.asarray(samples, dtype=np.float32)
    if getattr(result, "sound", None) is not None:
        batch = batch[None]  # Cosmos 3 returns one, [channels, samples], and not a batch
    if batch.ndim == 2:
        batch = batch[:, None]  # [batch, samples] of those with one channel
    return Sound([wave.T for wave in batch], _sampling_rate(pipe))


def _samples(result: Any) -> Any:
    found = (getattr(result, name, None) for name in SOUNDS)
    return next((samples for samples in found if samples is not None), None)


def _sampling_rate(pipe: Any) -> int:
    for path in SAMPLING_RATES:
        rate = reduce(lambda value, name: getattr(value, name, None), path.split("."), pipe)
        if rate is not None:
            return int(rate)
    raise OmniqError(f"nothing of {type(pipe).__name__} says the sampling rate of its sound.")
