"""`omniq generate` refuses a file that it could not save its result in, before it generates."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import FluxPipeline, WanPipeline

import omniq_compile as omniq
from omniq_compile.cli import main
from omniq_compile.cli.generate import returns_video

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
