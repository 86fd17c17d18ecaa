"""`omniq generate` refuses a file that it could not save its result in, before it generates."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import FluxPipeline, WanPipeline
from PIL import Image

import omniq_compile as omniq
from omniq_compile.cli import main
from omniq_compile.cli.generate import returns_video, save_result
from omniq_compile.quality.generation import pictures_of

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "pipeline"


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("x.abc", "no picture ends in '.abc'. Name it .png or .jpg, or .mp4 or .gif for a video"),
        ("x", "no picture ends in ''"),
        ("x.psd", "no picture ends in '.psd'"),  # which Pillow reads, and does not write
        (".", "Is a directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_loading(
    out: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(omniq, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert main(["generate", str(DIGITS), "--quantization", "int8", "--out", out]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "out", "words"),
    [
        (WanPipeline, "x.png", "a video is saved as .mp4 or .gif"),
        (FluxPipeline, "x.mp4", "no picture ends in '.mp4'. Name it .png or .jpg."),
        (WanPipeline, "x.mp4", ".mp4 needs an encoder: pip install imageio imageio-ffmpeg"),
        (WanPipeline, "x.gif", None),
        (FluxPipeline, "x.JPG", None),
    ],
)
def test_a_file_that_does_not_fit_the_pipeline_is_refused_before_generating(
    kind: Any,
    out: str,
    words: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Generated(Exception):
        pass

    @functools.wraps(kind.__call__)
    def generate(*_: Any, **__: Any) -> None:
        raise Generated

    pipe = kind(**dict.fromkeys(inspect.signature(kind).parameters))
    monkeypatch.setattr(kind, "__call__", generate)
    monkeypatch.setattr("omniq_compile.cli.generate.find_spec", lambda _: None)
    monkeypatch.setattr(omniq, "from_pretrained", lambda *_, **__: pipe)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind.__name__}))
    arguments = ["generate", str(tmp_path), "--prompt", "", "--out", str(tmp_path / out)]
    if words is None:
        with pytest.raises(Generated):
            main(arguments)
    else:
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["HunyuanVideoPipeline", "LTXPipeline", "CogVideoXPipeline"])
def test_video_pipelines_are_known(name: str) -> None:
    assert returns_video(getattr(diffusers, name)) is True


@pytest.mark.parametrize("name", ["QwenImagePipeline", "SanaPipeline", "ZImagePipeline"])
def test_picture_pipelines_are_known(name: str) -> None:
    assert returns_video(getattr(diffusers, name)) is False
    assert returns_video(type("Own", (getattr(diffusers, name),), {})) is False
    assert returns_video(diffusers.AudioLDM2Pipeline) is None


def test_every_video_is_saved_in_a_file_of_its_own(tmp_path: Path) -> None:
    videos = np.zeros((2, 3, 8, 8, 3), dtype=np.float32)
    videos[1, :, :, :, 0] = np.array([0.25, 0.5, 1.0]).reshape(3, 1, 1)
    paths = save_result(SimpleNamespace(frames=videos), tmp_path / "fox.gif")
    assert paths == [tmp_path / "fox_0.gif", tmp_path / "fox_1.gif"]
    for path, red in zip(paths, (0, 255), strict=True):
        with Image.open(path) as gif:
            gif.seek(gif.n_frames - 1)
            assert gif.convert("RGB").getpixel((4, 4))[0] == red
    assert save_result(SimpleNamespace(frames=videos[1:]), tmp_path / "x.gif") == [
        tmp_path / "x.gif"
    ]


def test_a_video_is_as_long_in_either_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []
    monkeypatch.setattr(
        "diffusers.utils.export_to_video", lambda *_, fps=10, **__: rates.append(fps)
    )
    frames = np.random.default_rng(0).random((1, 3, 8, 8, 3), dtype=np.float32)
    for name in ("fox.mp4", "fox.gif"):
        save_result(SimpleNamespace(frames=frames), tmp_path / name)
    with Image.open(tmp_path / "fox.gif") as gif:
        assert rates == [pytest.approx(1000 / gif.info["duration"], rel=0.05)]


@pytest.mark.parametrize("as_pillow", [False, True])
def test_layers_of_a_picture_are_pictures(as_pillow: bool, tmp_path: Path) -> None:
    """As QwenImageLayeredPipeline returns them: a list, or an array, for each picture."""
    values = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3, 1, 1, 1).repeat(8, 2).repeat(8, 3)
    values = values.repeat(4, 4)
    images: list[Any] = list(values.astype(np.float32) / 255)
    if as_pillow:
        images = [[Image.fromarray(layer) for layer in picture] for picture in values]
    assert pictures_of(SimpleNamespace(images=images)).shape == (6, 8, 8, 4)
    paths = save_result(SimpleNamespace(images=images), tmp_path / "fox.png")
    assert [Image.open(path).getpixel((0, 0)) for path in paths] == [(n,) * 4 for n in range(6)]
