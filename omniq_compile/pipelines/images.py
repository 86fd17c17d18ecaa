"""Pictures in files, for the arguments of a pipeline's call that take some."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from diffusers.utils import load_image
from PIL import Image

from omniq_compile.lowering.errors import OptionError

# Without a name a picture is for this argument.
IMAGE = "image"

# How an annotation of a list begins.
_LISTS = ("list[", "List[")


@dataclass(frozen=True)
class GivenImage:
    """A picture, the file that it was read from, and the argument that it is for.

    It is in RGBA where the file says what is transparent, and else in RGB. A pipeline is given
    what its VAE reads of that, see `call.call_worded`.
    """

    file: Path
    picture: Image.Image
    argument: str = IMAGE

    @property
    def digest(self) -> str:
        """What tells its pixels from others, the same in every run."""
        return hashlib.sha256(repr(self.picture.size).encode() + self.picture.tobytes()).hexdigest()


def read_images(given: Iterable[str | Path]) -> list[GivenImage]:
    """Read pictures as diffusers does, upright and in RGB, but with their alpha channels.

    Args:
        given: FILE, or NAME=FILE where NAME is an identifier, such as ``mask_image=mask.png``.

    Raises:
        OptionError: a file is missing or no picture.
    """
    images = []
    for text in given:
        name, equals, rest = str(text).partition("=")
        named = bool(equals) and name.isidentifier()
        file = Path(rest) if named else Path(text)
        if not file.is_file():
            raise OptionError(f"--image {text}: there is no such file.")
        try:
            picture = load_image(str(file), _with_alpha)
        # Pillow raises many more than OSError for a damaged file.
        except Exception as error:
            raise OptionError(
                f"--image {text} cannot be read as a picture: {str(error) or type(error).__name__}."
            ) from error
        images.append(GivenImage(file, picture, name if named else IMAGE))
    return images


def _with_alpha(picture: Image.Image) -> Image.Image:
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def with_images(arguments: Mapping[str, Any], images: Sequence[GivenImage]) -> dict[str, Any]:
    """Return arguments of a pipeline's call, and its pictures: one, or a list of several.

    Raises:
        OptionError: an argument is among both.
    """
    pictures = by_argument(images, lambda image: image.picture)
    for name in pictures:
        if name in arguments:
            raise OptionError(f"{name!r} is given by --image and again as another argument.")
    single = {name: found[0] if len(found) == 1 else found for name, found in pictures.items()}
    return {**arguments, **single}


def by_argument(
    images: Iterable[GivenImage], what: Callable[[GivenImage], Any]
) -> dict[str, list[Any]]:
    """Return something of each picture, by the argument that it is for."""
    found: dict[str, list[Any]] = {}
    for image in images:
        found.setdefault(image.argument, []).append(what(image))
    return found


def holds_pictures(value: Any) -> bool:
    """Say whether an argument is a picture, or a list of some."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Image.Image)


def takes_pictures(parameter: inspect.Parameter) -> bool:
    """Say whether a parameter may take a picture; many are annotated as tensors, and take both."""
    return _mentions(parameter, "Image", "Tensor", "ndarray", "Any")


def is_for_pictures(parameter: inspect.Parameter) -> bool:
    """Say whether a parameter is annotated to take pictures."""
    return parameter.annotation is not parameter.empty and _mentions(parameter, "Image")


def takes_several(parameter: inspect.Parameter) -> bool:
    """Say whether a parameter is annotated to take a list; one without annotation may."""
    return _mentions(parameter, "list[", "List[", "PipelineImageInput", "Any")


def as_taken(value: Any, mode: str, parameter: inspect.Parameter | None) -> Any:
    """Return a picture or several in the mode and the form that a pipeline takes them in.

    Args:
        value: a picture, or a list of some.
        mode: Pillow's, such as ``"RGB"``.
        parameter: that they are for, where the call names it. One that takes lists alone gets a
            list of one, and so does one that takes some and is named for several: OmniGen's
            ``input_images`` are annotated as one picture too, and counted all the same.
    """
    if isinstance(value, list):
        return [picture.convert(mode) for picture in value]
    picture = value.convert(mode)
    if parameter is None:
        return picture
    several = parameter.name.endswith("images") and is_for_pictures(parameter)
    wants_list = takes_lists_only(parameter) or (several and takes_several(parameter))
    return [picture] if wants_list else picture


def takes_lists_only(parameter: inspect.Parameter) -> bool:
    """Say whether a parameter is annotated to take a list, and no single picture."""
    kinds = _kinds(parameter)
    return bool(kinds) and all(kind.startswith(_LISTS) for kind in kinds)


def takes_tensors_only(parameter: inspect.Parameter) -> bool:
    """Say whether a parameter is annotated to take tensors, or lists of them, and nothing else."""
    kinds = _kinds(parameter)
    return bool(kinds) and all(kind.rstrip("]").endswith("Tensor") for kind in kinds)


def _kinds(parameter: inspect.Parameter) -> list[str]:
    """Return the kinds of values, as text, that an annotation has beside None."""
    annotation = parameter.annotation
    if isinstance(annotation, str):
        kinds = annotation.split(" | ")
    else:
        several = get_origin(annotation) in (Union, UnionType)
        kinds = [
            inspect.formatannotation(kind)
            for kind in (get_args(annotation) if several else (annotation,))
        ]
    return [kind for kind in kinds if kind not in ("None", "NoneType")]


def _mentions(parameter: inspect.Parameter, *words: str) -> bool:
    # An annotation may be text, and diffusers' own name for pictures or lists of them.
    text = str(parameter.annotation)
    return parameter.annotation is parameter.empty or any(word in text for word in words)
