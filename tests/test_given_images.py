"""Pictures in files: what is read of them, and in which form they reach a pipeline's call."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from omniq_compile.pipelines.call import call_worded
from omniq_compile.pipelines.images import read_images, with_images

pytest.importorskip("transformers")


def picture(file: Path, colour: Any, mode: str = "RGB") -> Path:
    Image.new(mode, (32, 32), colour).save(file)
    return file


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    file = tmp_path / "turned.jpg"
    Image.new("L", (20, 10)).save(file, exif=exif)
    (image,) = read_images([file])
    assert image.picture.size == (10, 20)
    assert image.picture.mode == "RGB"
    again, other = read_images([file, picture(tmp_path / "red.png", "red")])
    assert image.digest == again.digest != other.digest
    colours = ((255, 0, 0, 255), (255, 0, 0, 254))  # alike but for what a VAE of four channels sees
    files = [picture(tmp_path / f"{c[3]}.png", c, "RGBA") for c in colours]
    opaque, seen_through = read_images(files)
    assert opaque.digest != seen_through.digest


@pytest.mark.parametrize(
    ("name", "argument", "a_list"),
    [
        ("OmniGenPipeline", "input_images", True),  # annotated as one picture or several
        ("StableCascadePriorPipeline", "images", True),
        ("FluxKontextPipeline", "image", False),
        ("KandinskyV22Img2ImgPipeline", "image", False),
    ],
)
def test_a_single_picture_is_a_list_where_the_argument_is_named_for_several(
    name: str, argument: str, a_list: bool, tmp_path: Path
) -> None:
    """Diffusers counts those, or goes through them."""
    picture(tmp_path / "red.png", "red")
    seen: list[Any] = []

    class Pipeline:
        @functools.wraps(getattr(diffusers, name).__call__)
        def __call__(self, **given: Any) -> None:
            seen.append(given[argument])

    call_worded(Pipeline(), with_images({}, read_images([f"{argument}={tmp_path / 'red.png'}"])))
    (given,) = seen
    assert isinstance(given, list) == a_list
    assert (given[0] if a_list else given).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("RGB", (255, 0, 0), (255, 0, 0, 255)),
        ("RGBA", (255, 0, 0, 9), (255, 0, 0, 9)),
        ("P", 0, (0, 0, 0, 0)),  # with a colour of the palette that stands for none
    ],
)
def test_pictures_have_the_channels_that_the_vae_reads(
    channels: int, mode: str, colour: Any, seen: tuple[int, ...], tmp_path: Path
) -> None:
    """As those of QwenImageLayeredPipeline, which passes them on as they are."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        input_channels=channels,
    )  # fmt: skip
    file = picture(tmp_path / "x.png", colour, mode)
    if mode == "P":
        Image.open(file).save(file, transparency=colour)
    given: list[Any] = []

    class Pipeline:
        def __init__(self) -> None:
            self.vae = vae

        def __call__(self, image: Any) -> None:
            given.append(image)
            pixels = VaeImageProcessor(vae_scale_factor=2).preprocess(image)
            vae.encode(pixels[:, :, None])

    call_worded(Pipeline(), with_images({}, read_images([file])))
    assert given[0].getpixel((0, 0)) == seen[:channels]
