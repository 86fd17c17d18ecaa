"""Pictures in files, for pipelines whose call takes an ``image``."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import load_image
from PIL import Image

from omniq_compile.lowering.errors import OptionError


@dataclass(frozen=True)
class GivenImage:
    """A picture in RGB, and the file that it was read from."""

    file: Path
    picture: Image.Image

    @property
    def digest(self) -> str:
        """What tells its pixels from others, the same in every run."""
        return hashlib.sha256(repr(self.picture.size).encode() + self.picture.tobytes()).hexdigest()


def read_images(files: Iterable[Path]) -> list[GivenImage]:
    """Read pictures as diffusers does: upright, and in RGB.

    Raises:
        OptionError: a file is missing or no picture.
    """
    images = []
    for file in files:
        if not file.is_file():
            raise OptionError(f"--image {file}: there is no such file.")
        try:
            images.append(GivenImage(file, load_image(str(file))))
        # Pillow raises many more than OSError for a damaged file.
        except Exception as error:
            raise OptionError(
                f"--image {file} cannot be read as a picture: {str(error) or type(error).__name__}."
            ) from error
    return images


def image_argument(images: Sequence[GivenImage]) -> dict[str, Any]:
    """Return the argument of a pipeline's call: a picture, a list of several, or none at all."""
    pictures = [image.picture for image in images]
    return {"image": pictures[0] if len(pictures) == 1 else pictures} if pictures else {}


def takes_several(parameter: inspect.Parameter) -> bool:
    """Say whether a parameter is annotated to take a list; one without annotation may."""
    # An annotation may be text, and diffusers' own name for pictures or lists of them.
    text = str(parameter.annotation)
    return parameter.annotation is parameter.empty or any(
        kind in text for kind in ("list[", "List[", "PipelineImageInput", "Any")
    )
