"""What a diffusers pipeline returns: pictures, videos or sound, by the names that outputs have."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from omniq_compile.lowering.errors import OmniqError, OptionError

# Of the fields of diffusers' outputs: a batch of videos, or one; a batch of pictures; sound, alone
# or beside videos.
VIDEOS = ("frames", "video")
PICTURES = ("images", "image")
SOUNDS = ("audios", "audio", "sound")

Kind = Literal["videos", "pictures", "sound"]

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


def kind_returned(pipeline: type) -> Kind | None:
    """Say what a class of pipelines returns, of which sound is what it returns alone.

    Known by the class of outputs that its module names; None where it names none or several.
    """
    fields = {field for output in _outputs(pipeline) for field in _fields(output)}
    videos, pictures = not fields.isdisjoint(VIDEOS), not fields.isdisjoint(PICTURES)
    if videos != pictures:
        return "videos" if videos else "pictures"
    return "sound" if not videos and not fields.isdisjoint(SOUNDS) else None


def check_returns(pipeline: type, *, sound: bool) -> None:
    """Refuse a class of diffusers' pipelines that returns neither pictures nor videos.

    Others may return what no class of their module says, so that only a call shows it.

    Args:
        pipeline: the class.
        sound: whether sound will do, too.

    Raises:
        OptionError: it returns something else, such as text.
    """
    fields = {output.__name__: _fields(output) for output in _outputs(pipeline)}
    known = {*VIDEOS, *PICTURES, *(SOUNDS if sound else ())}
    if not fields or not known.isdisjoint(chain(*fields.values())):
        return
    if pipeline.__module__.startswith("diffusers."):
        said = "; ".join(f"{name} ({', '.join(found)})" for name, found in sorted(fields.items()))
        wanted = "pictures, a video nor sound" if sound else "pictures nor a video"
        raise OptionError(
            f"{pipeline.__name__} returns neither {wanted} by a name that is known, "
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
