"""What classes of diffusers' pipelines return, and how it is read whatever its name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import required_arguments, write_index

import omniq_compile as omniq
from omniq_compile.cli import main
from omniq_compile.cli.picture_file import save_result
from omniq_compile.pipelines.output import kind_returned
from omniq_compile.quality.generation import pictures_of

VIDEOS = ["HunyuanVideoPipeline", "LTXPipeline", "CogVideoXPipeline", "Kandinsky5T2VPipeline"]
# The last of both inherits the field or names it otherwise.
VIDEOS += ["LTX2DFRPipeline", "Cosmos3OmniPipeline"]
PICTURES = ["QwenImagePipeline", "SanaPipeline", "ZImagePipeline", "Kandinsky5T2IPipeline"]


def pipeline(name: str) -> Any:
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return kind


@pytest.mark.parametrize("name", VIDEOS)
def test_video_pipelines_are_known(name: str) -> None:
    assert kind_returned(pipeline(name)) == "videos"


@pytest.mark.parametrize("name", PICTURES)
def test_picture_pipelines_are_known(name: str) -> None:
    assert kind_returned(pipeline(name)) == "pictures"
    assert kind_returned(type("Own", (pipeline(name),), {})) == "pictures"


SOUND = "AudioPipelineOutput (audios)"
DEPTH = "MarigoldDepthOutput (prediction, uncertainty, latent)"


@pytest.mark.parametrize(
    ("command", "name", "words"),
    [
        ("compare", "StableAudioPipeline", SOUND),
        ("tune", "StableAudioPipeline", SOUND),
        ("compare", "AudioLDMPipeline", SOUND),  # without an annotation
        *((command, "MarigoldDepthPipeline", DEPTH) for command in ("generate", "compare", "tune")),
    ],
)
def test_pipelines_that_make_nothing_to_save_are_refused_before_loading(
    command: str,
    name: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(omniq, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    write_index(tmp_path, name)
    assert main([command, str(tmp_path), *required_arguments(command, tmp_path)]) == 2
    wanted = "pictures, a video nor sound" if command == "generate" else "pictures nor a video"
    assert f"{name} returns neither {wanted}" in (said := capsys.readouterr().err)
    assert f"but {words}. Load it by" in said


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_one_video_is_no_batch_of_pictures(kind: str, tmp_path: Path) -> None:
    """As Cosmos3OmniPipeline returns it, whose frames are in a row."""
    values = np.array([0, 51, 255], dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    values = values.repeat(3, 3)
    array = values.astype(np.float32) / 255
    video = {
        "pil": [Image.fromarray(frame) for frame in values],
        "np": array,
        "pt": torch.from_numpy(array).movedim(-1, 1),
    }[kind]
    result = SimpleNamespace(video=video, sound=None)
    assert np.array_equal(pictures_of(result), array)
    (file,) = save_result(result, tmp_path / "fox.gif")
    with Image.open(file) as gif:
        assert gif.n_frames == 3
        gif.seek(1)
        assert gif.convert("RGB").getpixel((4, 4)) == (51, 51, 51)


def test_pictures_by_the_name_of_one(tmp_path: Path) -> None:
    """As Kandinsky5T2IPipeline returns them."""
    colours = [(255, 0, 0), (0, 0, 255)]
    result = SimpleNamespace(image=[Image.new("RGB", (8, 8), colour) for colour in colours])
    assert pictures_of(result).shape == (2, 8, 8, 3)
    files = save_result(result, tmp_path / "fox.png")
    assert [Image.open(file).getpixel((0, 0)) for file in files] == colours
