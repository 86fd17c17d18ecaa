"""The files that ``omniq generate`` saves pictures and videos in: checked before, written after."""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from omniq_compile.checkpoints.whole_file import written_whole
from omniq_compile.cli import sound_file
from omniq_compile.lowering.errors import OptionError
from omniq_compile.output_file import numbered
from omniq_compile.pipelines.output import FRAMES_PER_SECOND, Kind, made_by

VIDEO_SUFFIXES = (".mp4", ".gif")


def check_ending(out: Path, kind: Kind | None) -> None:
    """Check that a file's ending names a format that the result can be saved in.

    Args:
        out: the file.
        kind: of the result; None where that is not known yet.

    Raises:
        OptionError: it does not.
    """
    videos = " or ".join(VIDEO_SUFFIXES)
    if kind in ("videos", None) and out.suffix.lower() in VIDEO_SUFFIXES:
        return
    if kind in ("sound", None) and out.suffix.lower() == sound_file.SUFFIX:
        return
    if kind == "videos":
        raise OptionError(f"--out {out}: a video is saved as {videos}.")
    if kind == "sound":
        raise OptionError(f"--out {out}: sound is saved as {sound_file.SUFFIX}.")
    if not _takes(out, "RGB"):
        others = f", {videos} for a video, or {sound_file.SUFFIX} for sound"
        raise OptionError(
            f"--out {out} cannot be written: no picture ends in {out.suffix!r}. "
            f"Name it .png or .jpg{'' if kind else others}."
        )


def check_rate(out: Path, frames_per_second: float | None) -> None:
    """Check that a file can show as many frames in a second, or is not asked to.

    Raises:
        OptionError: it shows one picture, or GIF, which counts hundredths of a second, shows fewer.
    """
    if frames_per_second is not None and out.suffix.lower() not in VIDEO_SUFFIXES:
        videos = " or ".join(VIDEO_SUFFIXES)
        raise OptionError(f"--fps is of a video, {videos}, which --out {out} is not: leave it out.")
    if out.suffix.lower() == ".gif" and frames_per_second is not None and frames_per_second > 100:
        raise OptionError(f"--out {out}: a .gif shows at most 100 frames a second; name it .mp4.")


def check_encoder(out: Path) -> None:
    """Check that what diffusers writes an .mp4 with is installed: OpenCV where imageio is not.

    Raises:
        OptionError: it is not.
    """
    needed = "imageio_ffmpeg" if find_spec("imageio") else "cv2"
    if out.suffix.lower() == ".mp4" and find_spec(needed) is None:
        raise OptionError(
            f"--out {out}: .mp4 needs an encoder: pip install imageio imageio-ffmpeg, or name it "
            ".gif."
        )


def save_result(result: Any, out: Path, frames_per_second: float = FRAMES_PER_SECOND) -> list[Path]:
    """Save what a pipeline returned: pictures or videos, one a file.

    Raises:
        OmniqError: it returned neither.
        OptionError: the file's ending does not fit, or it cannot be written.
    """
    made = made_by(result)
    try:
        row = made.batch if made.videos else _in_a_row(made.batch)
        paths = numbered(out, len(row))
        for one, path in zip(row, paths, strict=True):
            with written_whole(path) as place:
                if made.videos:
                    _save_video([_picture(frame) for frame in one], place, frames_per_second)
                else:
                    _save_picture(_picture(one), place)
        return paths
    except OptionError:
        raise  # it is a ValueError too
    except (OSError, ValueError) as error:
        raise OptionError(f"--out {out} cannot be written: {error}.") from error


def _in_a_row(images: Any) -> list[Any]:
    """Return pictures one after the other; pipelines of layers return those of each picture."""
    row: list[Any] = []
    for image in images:
        several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
        row.extend(image if several else [image])
    return row


def _picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        image = image.float().cpu().movedim(0, -1)  # numpy has no BF16, and channels last
    array = np.asarray(image, dtype=np.float32)
    return Image.fromarray((array.squeeze() * 255).round().clip(0, 255).astype(np.uint8))


def _format(out: Path) -> str | None:
    # Pillow looks at the ending alone, in any case.
    return Image.registered_extensions().get(out.suffix.lower())


def _save_picture(picture: Image.Image, out: Path) -> None:
    """Save a picture, on white where it has an alpha channel and the format none."""
    if picture.mode == "RGBA" and not _takes(out, "RGBA"):
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    picture.save(out)


def _takes(out: Path, mode: str) -> bool:
    # Pillow has no table of what each format takes, and names some that it only reads.
    try:
        Image.new(mode, (8, 8)).save(BytesIO(), _format(out) or "")
    except (KeyError, OSError, ValueError):
        return False
    return True


def _save_video(frames: list[Image.Image], out: Path, frames_per_second: float) -> None:
    check_ending(out, "videos")
    if out.suffix.lower() == ".mp4":
        from diffusers.utils import export_to_video

        export_to_video(frames, str(out), fps=frames_per_second)
        return
    # GIF counts hundredths of a second: at 24 frames a second, most last 4 and every sixth 5.
    times = [round(100 * number / frames_per_second) for number in range(len(frames) + 1)]
    durations = [10 * (end - start) for start, end in pairwise(times)]
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=durations, loop=0)
