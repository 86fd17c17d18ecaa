"""`omniq compare` on whole pipelines, from its command line."""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_interrupted import files_of_at_most

import omniq_compile as omniq
from omniq_compile.cli import main
from omniq_compile.lowering.errors import OptionError
from omniq_compile.quality import compare_figures, comparison
from omniq_compile.quality.generation import warm_up
from omniq_compile.quality.output_folder import work_folder

pytest.importorskip("skimage")
pytest.importorskip("transformers")
matplotlib = pytest.importorskip("matplotlib")
import tiny_pipelines  # noqa: E402

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "pipeline"
INT8 = '{"method": "int8", "min_features": 32, "compiler": "eager"}'
ON_DIGITS = ["--trust-remote-code", "--argument", "digits=[0,7]", "--steps", "3"]


def compare(folder: Path, out: Path, *arguments: str, quantization: str = INT8) -> int:
    command = ["compare", str(folder), "--quantization", quantization, "--out", str(out)]
    return main([*command, *arguments])


def result_in(out: Path) -> dict[str, Any]:
    text = (out / "result.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def is_drawn(file: Path) -> bool:
    return float(matplotlib.pyplot.imread(file)[..., :3].std()) > 0.05


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave models eager, where quantized weights are all that differs: most of a run compiles."""
    monkeypatch.setattr("omniq_compile.quality.comparison.compile_component", lambda *_: None)


def test_the_digits_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BF16 is gone before the quantized pipeline is loaded, and its numbers are the pipeline's."""
    alive: list[int] = []
    pipes: list[weakref.ref[Any]] = []
    original = omniq.from_pretrained

    def load(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in pipes))
        pipe = original(*args, **kwargs)
        pipes.append(weakref.ref(pipe.transformer))
        return pipe

    monkeypatch.setattr(omniq, "from_pretrained", load)
    assert compare(DIGITS, tmp_path / "out", *ON_DIGITS, "--seeds", "0,4-5") == 0
    assert alive == [0, 0]

    result = result_in(tmp_path / "out")
    assert result["gate"]["passed"]
    assert result["gate"]["thresholds"] == {"psnr": 20.0, "cosine": 0.98, "relative_l2": 0.2}
    assert [row["seed"] for row in result["per_seed"]] == [0, 4, 5]
    assert {len(row["pictures"]) for row in result["per_seed"]} == {2}
    assert {len(row["trajectory"]) for row in result["per_seed"]} == {3}
    assert "smaller than 64" in result["not_measured"]["lpips"]
    assert result["metrics"]["lpips"] == {"mean": None, "worst": None}
    assert result["metrics"]["psnr"]["worst"] == min(r["psnr"] for r in result["per_seed"])
    assert len(result["bf16"]["seconds"]) == len(result["quantized"]["seconds"]) == 3
    assert result["bf16"]["quantized_layers"] == 0
    assert result["quantized"]["quantized_layers"] == 59
    assert result["quantized"]["weight_bytes"] < 0.6 * result["bf16"]["weight_bytes"]
    assert is_drawn(tmp_path / "out" / "contact_sheet.png")
    assert is_drawn(tmp_path / "out" / "trajectory.png")
    assert not (tmp_path / "out" / ".work").exists()

    # The last seed again, by hand: eager BF16, and blocks compiled as the command compiles them.
    def draw(quantization: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pipe = original(DIGITS, quantization, trust_remote_code=True)
        if quantization is not None:
            omniq.compile(pipe.transformer, quantization)
        latents: list[torch.Tensor] = []

        def keep(_pipe: Any, _step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            latents.append(kwargs["latents"].double())
            return kwargs

        generator = torch.Generator().manual_seed(5)
        images = pipe(
            [0, 7], 3, generator=generator, output_type="pt", callback_on_step_end=keep
        ).images
        return images.double(), torch.stack(latents)

    (bf16, path), (int8, other) = draw(None), draw(json.loads(INT8))
    row = result["per_seed"][-1]
    assert row["psnr"] == pytest.approx(-10 * float((bf16 - int8).square().mean().log10()))
    drift = [float((b - a).norm() / a.norm()) for a, b in zip(path, other, strict=True)]
    assert row["trajectory"] == pytest.approx(drift, rel=1e-5)


def test_text_to_image(tmp_path: Path) -> None:
    folder = tiny_pipelines.save_text_to_image(tmp_path / "pipeline")
    size = ["--argument", "height=32", "width=32", "--prompt", "a red fox", "--steps", "2"]
    assert compare(folder, tmp_path / "out", *size, "--seeds", "3") == 0
    result = result_in(tmp_path / "out")
    (row,) = result["per_seed"]
    assert 30 < row["psnr"] < 90
    assert len(row["trajectory"]) == 2
    assert all(0 < distance < 0.1 for distance in row["trajectory"])
    assert 0.9 < row["ssim"] <= 1


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, 2),
        ({"strength": 0.3}, 2),
        ({"strength": 1.0}, 2),
        ({"strength": 0.05, "num_inference_steps": 30}, 1),
        ({"num_inference_steps": 3}, 1),
    ],
)
def test_a_pipeline_is_warmed_up_that_makes_a_share_of_its_steps(
    given: dict[str, Any], made: int
) -> None:
    steps = []

    class Pipeline:
        # As diffusers' pipelines that begin with a picture count them.
        def __call__(self, num_inference_steps: int = 50, strength: float = 0.4, **_: Any) -> Any:
            steps.append(int(num_inference_steps * strength))
            return SimpleNamespace(images=torch.zeros(1, 8, 8, 3))

    warm_up(Pipeline(), given, 0)
    assert steps == [made]


@pytest.mark.usefixtures("uncompiled")
def test_what_metrics_take_is_no_memory_of_the_quantized_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = comparison.picture_metrics

    def measure_large(reference: Any, picture: Any) -> Any:
        # As the metrics of a video take: its frames in float64, a few times.
        assert torch.ones(300_000_000, dtype=torch.uint8).any()
        return measure(reference, picture)

    monkeypatch.setattr(comparison, "picture_metrics", measure_large)
    assert compare(DIGITS, tmp_path / "out", *ON_DIGITS, "--seeds", "0") == 0
    peak = result_in(tmp_path / "out")["quantized"]["peak_bytes"]
    assert peak is None or peak < 200_000_000


@pytest.mark.usefixtures("uncompiled")
def test_text_to_video_is_measured_by_frame(tmp_path: Path) -> None:
    folder = tiny_pipelines.save_text_to_video(tmp_path / "pipeline")
    size = ["--argument", "height=16", "width=16", "num_frames=5", "max_sequence_length=16"]
    say = ["--prompt", "the snow", "--steps", "2", "--seeds", "1"]
    assert compare(folder, tmp_path / "out", *size, *say) == 0
    (row,) = result_in(tmp_path / "out")["per_seed"]
    assert [p["index"] for p in row["pictures"]] == [0, 1, 2, 3, 4]
    assert all(p["psnr"] > 20 for p in row["pictures"])
    # All frames as one: their mean squared errors averaged.
    mse = [10 ** (-p["psnr"] / 10) for p in row["pictures"]]
    assert row["psnr"] == pytest.approx(-10 * math.log10(sum(mse) / 5), rel=1e-4)
    assert is_drawn(tmp_path / "out" / "contact_sheet.png")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--ignored-layers", "re:.*"], "ignored by 're:.*'"),
        (["--quantization", "int8"], "is under min_features = 256"),
        (["--quantization", '{"vae": null}'], "they give no method to transformer"),
    ],
)
def test_a_gate_is_not_passed_by_quantizing_nothing(
    arguments: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(DIGITS, tmp_path / "out", *ON_DIGITS, "--seeds", "0", *arguments) == 2
    error = capsys.readouterr().err
    assert "these options quantize no layer of" in error
    assert why in error


@pytest.mark.usefixtures("uncompiled")
def test_a_folder_is_named_as_it_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compared[int8]"
    assert compare(DIGITS, out, *ON_DIGITS, "--seeds", "0") == 0
    assert f"passed; wrote {out}\n" in capsys.readouterr().err


@pytest.mark.usefixtures("uncompiled")
def test_a_plot_of_the_result_that_is_replaced_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare(DIGITS, tmp_path / "out", *ON_DIGITS, "--seeds", "0") == 0
    monkeypatch.setattr(comparison, "_trajectory", lambda *_: [])
    again = [*ON_DIGITS, "--seeds", "0", "--overwrite"]
    assert compare(DIGITS, tmp_path / "out", *again) == 0
    assert "trajectory_plot" not in result_in(tmp_path / "out")
    assert not (tmp_path / "out" / "trajectory.png").exists()


@pytest.mark.usefixtures("uncompiled")
def test_no_earlier_result_stands_beside_new_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "result.json").write_text("earlier")
    again = [*ON_DIGITS, "--seeds", "0", "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "_seed_row", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            compare(DIGITS, tmp_path, *again)
    assert (tmp_path / "result.json").read_text() == "earlier"
    monkeypatch.setattr(compare_figures, "trajectory_plot", lambda *_: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        compare(DIGITS, tmp_path, *again)
    assert [file.name for file in tmp_path.iterdir()] == ["contact_sheet.png"]


def test_keeping_every_layer_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Refused on the command line; here it shows that the two sides differ in nothing else.
    monkeypatch.setattr("omniq_compile.quality.comparison._check_reference", lambda *_: None)
    out = tmp_path / "out"
    ignored = ["--ignored-layers", "re:.*", "--gate", "strict", "--min-psnr", "1000"]
    assert compare(DIGITS, out, *ON_DIGITS, "--seeds", "0", *ignored) == 0
    result = result_in(out)
    assert result["metrics"]["psnr"] == {"mean": "Infinity", "worst": "Infinity"}
    assert result["metrics"]["mae"]["worst"] == 0
    assert result["quantization"]["ignored_layers"] == ["re:.*"]


def spoiled(folder: Path) -> Path:
    """Copy the digits with outliers in a weight, where one scale a row cannot hold the rest."""
    shutil.copytree(DIGITS, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.endswith("img_mlp.net.2.weight"):
            # Inputs here are outputs of GELU: this one is negative, small, and its share is lost.
            weights[name][:, 0] += 200.0
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.usefixtures("uncompiled")
def test_a_spoiled_model_fails_the_gate(tmp_path: Path) -> None:
    folder = spoiled(tmp_path / "spoiled")
    assert compare(folder, tmp_path / "out", *ON_DIGITS, "--seeds", "1") == 1
    result = result_in(tmp_path / "out")
    assert not result["gate"]["passed"]
    assert result["metrics"]["psnr"]["worst"] < 20
    assert any("psnr" in line and "under 20" in line for line in result["gate"]["failures"])
    # What keeps the spoiled layers passes.
    keep = ["--ignored-layers", "img_mlp.net.2"]
    assert compare(folder, tmp_path / "kept", *ON_DIGITS, "--seeds", "1", *keep) == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"folder": "nowhere"}, "nowhere is not a folder"),
        ({"quantization": "int9"}, "unknown method 'int9'. Did you mean 'int8'?"),
        ({"--seeds": "0-x"}, "'0-x' is neither a seed nor a range"),
        ({"--seeds": "5-3"}, "runs backwards"),
        ({"--seeds": "0-99999999999"}, "'0-99999999999' are more than 100000 pictures"),
        ({"--seeds": "1,0-2"}, "names a seed twice"),
        ({"--device": "gpu"}, "--device 'gpu' cannot be used"),
        ({"--out": "file/inside"}, "--out file/inside: file is a file. Choose another folder."),
        ({"--argument": "digit=[1]"}, "Did you mean 'digits'?"),
        ({"--argument": "digits=[12]"}, "digits[0] is 12"),
    ],
)
def test_errors_have_exit_code_2(
    changed: dict[str, str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    given = {"--seeds": "0", "--argument": "digits=[1]", "--out": "out", **changed}
    folder = given.pop("folder", str(DIGITS))
    quantization = given.pop("quantization", INT8)
    pairs = [text for pair in given.items() for text in pair]
    command = ["compare", folder, "--quantization", quantization, "--trust-remote-code", *pairs]
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert not Path("out", "result.json").exists()


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_a_second_run_leaves_the_folder_of_the_first_alone(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / ".work").mkdir(parents=True)
    (tmp_path / "out" / ".work" / "left by a run that was killed").touch()
    with work_folder(tmp_path / "out") as work:
        assert list(work.iterdir()) == []
        (work / "of the first").touch()
        needed = tiny_pipelines.required_arguments(command, tmp_path)
        assert main([command, str(DIGITS), *ON_DIGITS, *needed]) == 2
        assert f"{tmp_path / 'out'} is being written by another" in capsys.readouterr().err
        assert [file.name for file in work.iterdir()] == ["of the first"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on this system")
def test_a_full_disk_while_pictures_wait_on_it_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(OptionError, match=f"^--out {tmp_path} cannot be written to: .*os error"),
        work_folder(tmp_path) as work,
        files_of_at_most(1024),
    ):
        save_file({"pictures": torch.zeros(1, 64, 64, 3)}, work / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_quantized_weights_is_no_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    assert main(["quantize", str(DIGITS), "--quantization", INT8, "--out", str(made)]) == 0
    assert compare(made, tmp_path / "out", *ON_DIGITS, "--seeds", "0") == 2
    assert "give the folder it was quantized from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
