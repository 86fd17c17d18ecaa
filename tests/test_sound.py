"""Sound that pipelines make, alone or beside a video, is saved at its own sampling rate."""

from __future__ import annotations

import functools
import inspect
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    LTXPipeline,
    StableAudioDiTModel,
    StableAudioPipeline,
)
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from tiny_pipelines import WORDS, tiny_text, write_index

import omniq_compile as omniq
from omniq_compile.cli import main
from omniq_compile.cli.sound_file import save_sound
from omniq_compile.lowering.errors import OmniqError, OptionError
from omniq_compile.pipelines.output import kind_returned
from omniq_compile.pipelines.sound import Sound, has_sound, sound_of

RATE = 64
PROMPT = " ".join(WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Audio pipeline of 64 samples a second, in stereo."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("sound") / "pipeline"
    tokenizer, encoder = tiny_text(32)
    StableAudioPipeline(
        vae=AutoencoderOobleck(
            encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3,
            decoder_input_channels=4, audio_channels=2, channel_multiples=[2, 4],
            sampling_rate=RATE,
        ).to(torch.bfloat16),
        text_encoder=encoder,
        projection_model=StableAudioProjectionModel(32, 32, 0, 32).to(torch.bfloat16),
        tokenizer=tokenizer,
        transformer=StableAudioDiTModel(
            sample_size=32, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=4, num_key_value_attention_heads=2, cross_attention_dim=32,
            time_proj_dim=64, global_states_input_dim=64, cross_attention_input_dim=32,
        ).to(torch.bfloat16),
        scheduler=EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    ).save_pretrained(place)  # fmt: skip
    return place


def read(file: Path) -> tuple[np.ndarray[Any, Any], int]:
    """Values ``[samples, channels]`` and the sampling rate, by Python's own reader."""
    with wave.open(str(file)) as opened:
        assert opened.getsampwidth() == 2
        values = np.frombuffer(opened.readframes(opened.getnframes()), "<i2")
        return values.reshape(-1, opened.getnchannels()) / 32767, opened.getframerate()


def generate(folder: Path, out: Path, *more: str) -> int:
    arguments = ["--prompt", PROMPT, "--argument", "audio_end_in_s=0.5", "--steps", "2"]
    return main(["generate", str(folder), *arguments, "--out", str(out), *more])


def test_sound_is_generated_in_int8(folder: Path, tmp_path: Path) -> None:
    assert kind_returned(StableAudioPipeline) == "sound"
    options = '{"transformer": {"method": "int8", "min_features": 1}}'
    assert generate(folder, tmp_path / "fox.wav", "--quantization", options) == 0
    found, rate = read(tmp_path / "fox.wav")
    pipe = StableAudioPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    expected = pipe(
        PROMPT,
        num_inference_steps=2,
        audio_end_in_s=0.5,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).audios[0]
    assert rate == RATE
    assert found.shape == (RATE // 2, 2) == expected.T.shape
    expected = expected.T.clip(-1, 1)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.2


def test_several_sounds_are_several_files(folder: Path, tmp_path: Path) -> None:
    several = ["--argument", "num_waveforms_per_prompt=2", "--eager", "--quantization", "int8"]
    assert generate(folder, tmp_path / "fox.WAV", *several) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fox_0.WAV", "fox_1.WAV"]
    assert not np.array_equal(*(read(file)[0] for file in tmp_path.iterdir()))


def test_sound_is_saved_as_sound_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(folder, tmp_path / "fox.png", "--quantization", "int8") == 2
    assert "sound is saved as .wav" in capsys.readouterr().err


SAMPLES = np.linspace(-1.2, 1.2, 240, dtype=np.float32)


@pytest.mark.parametrize(
    ("result", "shapes"),
    [
        (SimpleNamespace(audios=SAMPLES.reshape(2, 2, 60)), [(60, 2)] * 2),  # Stable Audio
        (SimpleNamespace(audios=SAMPLES.reshape(2, 120)), [(120, 1)] * 2),  # AudioLDM 2
        (SimpleNamespace(frames=[], audio=torch.from_numpy(SAMPLES).view(1, 2, 120)), [(120, 2)]),
        (SimpleNamespace(video=[], sound=torch.from_numpy(SAMPLES).view(2, 120)), [(120, 2)]),
    ],
)
def test_sound_of_every_shape_that_pipelines_return(
    result: Any, shapes: list[tuple[int, int]], tmp_path: Path
) -> None:
    pipe = SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(sample_rate=24000)))
    sound = sound_of(pipe, result)
    assert [wave.shape for wave in sound.waves] == shapes
    files = save_sound(sound, tmp_path / "fox.wav")
    read_back = np.concatenate([read(file)[0].T.reshape(-1) for file in files])
    assert np.abs(read_back - SAMPLES.clip(-1, 1)).max() <= 0.5 / 32767
    assert {read(file)[1] for file in files} == {24000}


def test_the_rate_is_that_of_the_vocoder() -> None:
    """LTX-2's spectrograms are of 16,000 samples a second, and its sound of 24,000."""
    ltx2 = pytest.importorskip("diffusers.pipelines.ltx2.vocoder")
    pipe = SimpleNamespace(
        audio_vae=AutoencoderKLLTX2Audio(base_channels=4),
        vocoder=ltx2.LTX2Vocoder(hidden_channels=32),
    )
    result = SimpleNamespace(frames=[], audio=torch.zeros(1, 2, 8))
    assert pipe.audio_vae.config.sample_rate == 16000
    assert sound_of(pipe, result).sampling_rate == 24000


def test_a_rate_that_nothing_says() -> None:
    result = SimpleNamespace(audios=SAMPLES[None])
    assert has_sound(result)
    with pytest.raises(OmniqError, match="nothing of SimpleNamespace says the sampling rate"):
        sound_of(SimpleNamespace(), result)
    assert not has_sound(SimpleNamespace(frames=[], audio=None))


@pytest.mark.parametrize("rate", [8000, None])
def test_sound_beside_a_video_is_a_file_by_its_name(
    rate: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @functools.wraps(LTXPipeline.__call__)
    def generate(*_: Any, **__: Any) -> Any:
        frames = np.random.default_rng(0).random((2, 3, 8, 8, 3), dtype=np.float32)
        return SimpleNamespace(frames=frames, audio=SAMPLES.reshape(2, 1, 120))

    pipe = LTXPipeline(**dict.fromkeys(inspect.signature(LTXPipeline).parameters))
    pipe.vae = SimpleNamespace(config=SimpleNamespace(sampling_rate=rate))
    monkeypatch.setattr(LTXPipeline, "__call__", generate)
    monkeypatch.setattr(omniq, "from_pretrained", lambda *_, **__: pipe)
    write_index(tmp_path, "LTXPipeline")
    out = tmp_path / "fox.gif"
    assert main(["generate", str(tmp_path), "--prompt", "", "--out", str(out)]) == 0
    sounds = sorted(file.name for file in tmp_path.glob("*.wav"))
    videos = sorted(file.name for file in tmp_path.glob("*.gif"))
    assert videos == ["fox_0.gif", "fox_1.gif"]
    assert sounds == (["fox_0.gif.wav", "fox_1.gif.wav"] if rate else [])
    said = capsys.readouterr().err
    assert ("warning: sound is not saved: nothing of LTXPipeline says" in said) == (rate is None)
    assert all(f"wrote {tmp_path / name}" in said for name in videos + sounds)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    sound = Sound([SAMPLES[:, None]], 8000)
    (tmp_path / "fox.wav").mkdir()
    with pytest.raises(OptionError, match="cannot be written"):
        save_sound(sound, tmp_path / "fox.wav")


@pytest.mark.parametrize("name", ["LTX2Pipeline", "Cosmos3OmniPipeline", "Kandinsky6TI2VAPipeline"])
def test_a_video_with_sound_is_a_video(name: str) -> None:
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    assert kind_returned(kind) == "videos"


def test_sound_cannot_be_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--quantization", "int8", "--prompt", PROMPT, "--out", str(tmp_path / "out")]
    assert main(["compare", str(folder), *out]) == 2
    assert "returns neither pictures nor a video" in capsys.readouterr().err
