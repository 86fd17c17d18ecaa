"""`omniq generate` refuses a file that it could not save its result in, before it generates."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import FluxPipeline, LTXPipeline, PixArtAlphaPipeline, WanPipeline
from PIL import Image, ImageSequence
from tiny_pipelines import write_index

import omniq_compile as omniq
from omniq_compile.cli import main
from omniq_compile.cli.picture_file import save_result
from omniq_compile.quality.generation import pictures_of

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "pipeline"


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("x.abc", "no picture ends in '.abc'. Name it .png or .jpg, .mp4 or .gif for a video"),
        ("x", "no picture ends in ''"),
        ("x.GIF --fps 101", "a .gif shows at most 100 frames a second; name it .mp4"),
        ("x.png --fps 24", "--fps is of a video, .mp4 or .gif, which --out x.png is not"),
        ("x.png --device meta", "--device 'meta' cannot be used: its tensors have no values"),
        ("x.psd", "no picture ends in '.psd'"),  # which Pillow reads, and does not write
        ("x.hdf", "no picture ends in '.hdf'"),  # which it writes where another library does
        (".", "Is a directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_loading(
    out: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(omniq, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    command = ["generate", str(DIGITS), "--quantization", "int8", "--out", *out.split(" ")]
    assert main(command) == 2
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
    monkeypatch.setattr("omniq_compile.cli.picture_file.find_spec", lambda _: None)
    monkeypatch.setattr(omniq, "from_pretrained", lambda *_, **__: pipe)
    write_index(tmp_path, kind.__name__)
    arguments = ["generate", str(tmp_path), "--prompt", "", "--out", str(tmp_path / out)]
    if words is not None and "needs an encoder" not in words:
        monkeypatch.setattr(omniq, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    if words is None:
        with pytest.raises(Generated):
            main(arguments)
    else:
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def test_every_video_is_saved_in_a_file_of_its_own(tmp_path: Path) -> None:
    videos = np.zeros((2, 3, 8, 8, 3), dtype=np.float32)
    videos[1, :, :, :, 0] = np.array([0.25, 0.5, 1.0]).reshape(3, 1, 1)
    paths = save_result(SimpleNamespace(frames=videos), tmp_path / "fox.gif")
    assert paths == [tmp_path / "fox_0.gif", tmp_path / "fox_1.gif"]
    for path, red in zip(paths, (0, 255), strict=True):
        with Image.open(path) as gif:
            gif.seek(gif.n_frames - 1)
            assert gif.convert("RGB").getpixel((4, 4))[0] == red
    (capital,) = save_result(SimpleNamespace(frames=videos[1:]), tmp_path / "x.GIF")
    assert capital == tmp_path / "x.GIF"
    with Image.open(capital) as gif:
        assert (gif.format, gif.n_frames) == ("GIF", 3)


@pytest.mark.parametrize("rate", [8, 24.0, 30, 60])
def test_a_video_is_as_long_in_either_format(
    rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    def export(frames: list[Any], file: str, fps: float = 10) -> None:
        lengths.append(1000 * len(frames) / fps)
        Path(file).write_bytes(b"mp4")

    monkeypatch.setattr("diffusers.utils.export_to_video", export)
    frames = np.random.default_rng(0).random((1, 30, 8, 8, 3), dtype=np.float32)
    for name in ("fox.mp4", "fox.MP4", "fox.gif"):
        save_result(SimpleNamespace(frames=frames), tmp_path / name, rate)
    assert lengths == [pytest.approx(milliseconds(tmp_path / "fox.gif"), abs=5)] * 2


def milliseconds(file: Path) -> float:
    with Image.open(file) as gif:
        return sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif))


@pytest.mark.parametrize(
    ("kind", "given", "rate"),
    [
        (WanPipeline, [], 16),
        (WanPipeline, ["--fps", "30"], 30),
        (LTXPipeline, [], 25),  # the default of its `frame_rate`
        (LTXPipeline, ["--argument", "frame_rate=50"], 50),
        (LTXPipeline, ["--argument", "frame_rate=50", "--fps", "10"], 10),
    ],
)
def test_a_video_is_saved_at_the_rate_that_it_is_made_for(
    kind: Any,
    given: list[str],
    rate: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    noise = np.random.default_rng(0).random((1, 100, 8, 8, 3), dtype=np.float32)

    @functools.wraps(kind.__call__)
    def generate(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(frames=noise)

    pipe = kind(**dict.fromkeys(inspect.signature(kind).parameters))
    monkeypatch.setattr(kind, "__call__", generate)
    monkeypatch.setattr(omniq, "from_pretrained", lambda *_, **__: pipe)
    write_index(tmp_path, kind.__name__)
    out = tmp_path / "fox.gif"
    assert main(["generate", str(tmp_path), "--prompt", "", *given, "--out", str(out)]) == 0
    assert "is not quantized: name a method with --quantization" in capsys.readouterr().err
    assert milliseconds(out) == pytest.approx(100 * 1000 / rate, abs=5)


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_steps_that_a_pipeline_does_not_say_are_refused_before_loading(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every step would count as the first."""
    monkeypatch.setattr(omniq, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert "callback_on_step_end" not in inspect.signature(PixArtAlphaPipeline.__call__).parameters
    write_index(tmp_path, "PixArtAlphaPipeline")
    options = json.dumps({"method": "mxfp4", "w4a8_fallback_steps": [1]})
    out = ["--prompt", "", "--out", str(tmp_path / "out.png")]
    assert main([command, str(tmp_path), "--quantization", options, *out]) == 2
    assert "PixArtAlphaPipeline does not say it" in capsys.readouterr().err


@pytest.mark.parametrize("fps", ["0", "-1", "fast"])
def test_a_video_shows_a_whole_number_of_frames_in_a_second(fps: str) -> None:
    with pytest.raises(SystemExit):
        main(["generate", str(DIGITS), "--out", "x.gif", "--fps", fps])


@pytest.mark.parametrize("as_pillow", [False, True])
def test_a_transparent_picture_is_on_white_where_the_format_knows_no_transparency(
    as_pillow: bool, tmp_path: Path
) -> None:
    # Red that is transparent on the left, and opaque on the right.
    pixels = np.zeros((16, 32, 4), dtype=np.uint8)
    pixels[..., 0], pixels[:, 16:, 3] = 255, 255
    images: Any = [Image.fromarray(pixels)] if as_pillow else pixels[None] / np.float32(255)
    for name in ("x.png", "x.JPG"):
        save_result(SimpleNamespace(images=images), tmp_path / name)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), pixels)
    shown = np.asarray(Image.open(tmp_path / "x.JPG")).astype(int)
    assert abs(shown[8, 4] - (255, 255, 255)).max() < 8
    assert abs(shown[8, 28] - (255, 0, 0)).max() < 8


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
