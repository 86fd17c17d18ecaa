"""The files that ``omniq generate`` saves sound in."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

from omniq_compile.checkpoints.whole_file import written_whole
from omniq_compile.lowering.errors import OptionError
from omniq_compile.output_file import numbered
from omniq_compile.pipelines.sound import Sound

SUFFIX = ".wav"


def save_sound(sound: Sound, out: Path) -> list[Path]:
    """Save sounds as 16-bit PCM, one a file.

    Args:
        sound: one or several.
        out: the file; of another ending it is the video's that the sound belongs to, and ``.wav``
            is added to its name.

    Raises:
        OptionError: a file cannot be written.
    """
    paths = numbered(out, len(sound.waves))
    if out.suffix.lower() != SUFFIX:
        paths = [path.with_name(path.name + SUFFIX) for path in paths]
    for samples, path in zip(sound.waves, paths, strict=True):
        values = (np.nan_to_num(samples).clip(-1, 1) * 32767).round().astype("<i2")
        try:
            # Opened here: a Wave_write that cannot open its file fails once more when it is freed.
            with (
                written_whole(path) as place,
                place.open("wb") as opened,
                wave.open(opened, "wb") as file,
            ):
                file.setnchannels(values.shape[1])
                file.setsampwidth(2)
                file.setframerate(sound.sampling_rate)
                file.writeframes(values.tobytes())
        except OSError as error:
            raise OptionError(f"--out {path} cannot be written: {error}.") from error
    return paths
