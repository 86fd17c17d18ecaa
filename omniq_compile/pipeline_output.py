"""What a diffusers pipeline returns: its pictures or videos, by the names that outputs have."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from omniq_compile.lowering.errors import OmniqError, OptionError

# Of the fields of diffusers' outputs: a batch of videos, or one; a batch of pictures.
VIDEOS = ("frames", "video")
PICTURES = ("images", "image")

FRAMES_PER_SECOND = 16  # Wan's, whose pipelines do not say it.


@dataclass(frozen=True)
class Made:
    """What a pipeline made.

    Attributes:
        videos: whether each is a video, and not a picture.
        batch: of pictures, or of the frames of videos: lists, arrays or tensors.
    """

    videos: bool
    batch: Any


def made_by(result: Any) -> Made:
    """Return the pictures or videos that a pipeline returned.

    Raises:
        OmniqError: it returned neither.
    """
    for name in (*VIDEOS, *PICTURES):
        made: Any = getattr(result, name, None)
        if made is not None:
            single = isinstance(made, Image.Image)
            # Cosmos 3 returns one video, and not a batch of one.
            if name == "video":
                single = not isinstance(made[0], (list, tuple)) and getattr(made[0], "ndim", 3) == 3
            return Made(name in VIDEOS, [made] if single else made)
    raise OmniqError(f"the pipeline returned {type(result).__name__}, which has no pictures.")


def has_sound(result: Any) -> bool:
    """Say whether a pipeline made sound beside its video."""
    return any(getattr(result, name, None) is not None for name in ("audio", "sound"))


def returns_video(pipeline: type) -> bool | None:
    """Say whether a class of pipelines returns videos, or else pictures.

    Known by the class of outputs that its module names; None where it names neither or both.
    """
    fields = {field for output in _outputs(pipeline) for field in _fields(output)}
    videos, pictures = not fields.isdisjoint(VIDEOS), not fields.isdisjoint(PICTURES)
    return videos if videos != pictures else None


def check_returns_pictures(pipeline: type) -> None:
    """Refuse a class of diffusers' pipelines that returns neither pictures nor videos.

    Others may return what no class of their module says, so that only a call shows it.

    Raises:
        OptionError: it returns something else, such as sound or text.
    """
    fields = {output.__name__: _fields(output) for output in _outputs(pipeline)}
    if not fields or not {*VIDEOS, *PICTURES}.isdisjoint(chain(*fields.values())):
        return
    if pipeline.__module__.startswith("diffusers."):
        said = "; ".join(f"{name} ({', '.join(found)})" for name, found in sorted(fields.items()))
        raise OptionError(
            f"{pipeline.__name__} returns neither pictures nor a video by a name that is known, "
            f"but {said}. Load it by omniq_compile.from_pretrained, and call it in Python."
        )


def _outputs(pipeline: type) -> set[type[BaseOutput]]:
    """Return the classes of outputs that the modules of a pipeline's call name."""
    return {
        value
        for cls in pipeline.__mro__[: pipeline.__mro__.index(DiffusionPipeline)]
        # What else it inherits from, as of a deprecated one, says nothing of what is returned.
        if "__call__" in vars(cls)
        for value in vars(sys.modules[cls.__module__]).values()
        if isinstance(value, type) and issubclass(value, BaseOutput) and value is not BaseOutput
    }


def _fields(output: type[BaseOutput]) -> list[str]:
    return [f.name for f in dataclasses.fields(output)] if dataclasses.is_dataclass(output) else []


def frame_rate(pipeline: Any, given: Mapping[str, Any]) -> float:
    """Return the frames per second that a pipeline makes its videos for.

    Args:
        pipeline: or its class.
        given: arguments of its call, of which ``frame_rate`` or ``fps`` says it, or its default.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    for name in ("frame_rate", "fps"):
        if name in parameters:
            rate = given.get(name, parameters[name].default)
            if isinstance(rate, (int, float)) and 0 < rate < math.inf:
                return rate
    return FRAMES_PER_SECOND
