"""What a user gets wrong on the command line is one line and code 2, before the work it spoils."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AuraFlowPipeline
from diffusers.utils import import_utils
from PIL import Image

from omniq_compile import CheckpointError, OptionError, __version__
from omniq_compile.checkpoints.loading import load_model
from omniq_compile.cli import main
from omniq_compile.cli.picture_file import save_result
from omniq_compile.pipelines.components import build_quant_config
from omniq_compile.pipelines.from_pretrained import check_components
from omniq_compile.pipelines.images import takes_tensors_only

pytest.importorskip("transformers")
import tiny_pipelines

SMALL = {"method": "int8", "min_features": 16}
QUANTIZATION = json.dumps({"transformer": SMALL, "text_encoder": SMALL})
LACKING = {"transformers": (lambda: False, import_utils.TRANSFORMERS_IMPORT_ERROR)}
SIZE = ["--steps", "2", "--argument", "height=32", "width=32"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save_text_to_image(tmp_path_factory.mktemp("mistakes") / "t2i")


@pytest.fixture
def copied(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be spoiled, in the folder that is worked in."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(pipeline, "t2i"))


def failed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Run a command that has to fail; returns what it prints, without the names of others."""
    assert main(list(command)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.split(": error: ", 1)[1].strip()


def test_quantize_says_how_many_layers(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "t2i", "--quantization", QUANTIZATION, "--out", "q1"]) == 0
    printed = capsys.readouterr().err
    for name in ("transformer", "text_encoder"):
        assert f"{name}: " in printed
    assert "0 linear layers" not in printed
    assert printed.count(" linear layers to int8, ") == 2


def test_quantize_writes_no_folder_of_bf16(
    copied: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for folder, name, advice in (
        (
            "t2i",
            "transformer",
            '\'{"transformer": {"method": "...", "min_features": 1}}\', or leave',
        ),
        ("t2i/transformer", "t2i/transformer", '\'{"method": "...", "min_features": 1}\'.'),
    ):
        error = failed(capsys, "quantize", folder, "--quantization", "int8", "--out", "q1")
        assert error.startswith(f"{name}: no layer is quantized to int8: ")
        assert (
            f"is under min_features = 256. Change that option, as in --quantization {advice}"
            in (error)
        )
        assert not Path("q1").exists()
    command = ["quantize", "t2i", "--quantization", '{"text_encoder": "int8"}', "--out", "q1"]
    assert failed(capsys, *command).startswith("text_encoder: no layer is quantized")
    assert caplog.text == ""  # nor is it said twice


def test_generate_says_how_many_layers(
    copied: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    command = ["generate", "t2i", "--prompt", "a fox", *SIZE, "--eager", "--out", "x.png"]
    mixed = json.dumps({"transformer": "int8", "text_encoder": SMALL})
    assert main([*command, "--quantization", mixed]) == 0
    printed = capsys.readouterr().err
    assert "warning: transformer: no layer is quantized to int8: " in printed
    assert "text_encoder: 7 linear layers to int8, 0 kept" in printed
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "AuraFlowPipeline refused its arguments: Provide either `prompt`"),
        (["--prompt", "fox", "--argument", "height=33"], "have to be divisible by"),
        (["--prompt", "fox", "--argument", 'height="32"'], "(TypeError)"),
    ],
)
def test_what_the_pipeline_refuses_is_one_line(
    arguments: list[str], words: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failed(capsys, "generate", "t2i", "--out", "x.png", *arguments)
    assert words in error
    assert "\n" not in error


def test_a_library_that_the_pipeline_lacks_is_one_line(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        import_utils.requires_backends(AuraFlowPipeline, ["transformers"])

    # What diffusers puts in a pipeline's place.
    monkeypatch.setattr(import_utils, "BACKENDS_MAPPING", LACKING)
    monkeypatch.setattr(AuraFlowPipeline, "from_pretrained", refuse)
    error = failed(capsys, "generate", "t2i", "--out", "x.png", "--prompt", "fox")
    assert "t2i cannot be loaded: AuraFlowPipeline requires the transformers library" in error
    assert "`pip install transformers`" in error
    assert "\n" not in error


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_names_of_arguments_are_checked_before_weights_are_read(
    command: str,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("omniq_compile.from_pretrained", lambda *_, **__: pytest.fail("read"))
    more = [command, "t2i", "--quantization", "int8", "--out", "x.png", "--prompt", "fox"]
    assert "Did you mean 'height'?" in failed(capsys, *more, "--argument", "heigth=32")


@pytest.mark.parametrize("text", ["latents=[1]", "latents=[[1, 2]]", 'prompt_embeds="fox"'])
def test_no_json_is_taken_for_a_tensor(
    text: str, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("omniq_compile.from_pretrained", lambda *_, **__: pytest.fail("read"))
    more = ["generate", "t2i", "--out", "x.png", "--argument", text]
    words = f"argument {text.split('=')[0]!r} of AuraFlowPipeline is a tensor"
    assert words in failed(capsys, *more)


@pytest.mark.parametrize(
    ("annotation", "alone"),
    [
        (torch.Tensor | None, True),
        ("torch.FloatTensor | None", True),
        (list[torch.Tensor] | None, True),
        (torch.Tensor | list[int] | int | None, False),
        (torch.Tensor | list[torch.Tensor] | Image.Image, False),
        (list[float] | None, False),
        (inspect.Parameter.empty, False),
        (None, False),
    ],
)
def test_annotations_of_tensors_alone(annotation: Any, alone: bool) -> None:
    kind = inspect.Parameter.KEYWORD_ONLY
    assert takes_tensors_only(inspect.Parameter("x", kind, annotation=annotation)) is alone


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps: 0 is less than 1"),
        (["--steps", "-1"], "--steps: -1 is less than 1"),
        (["--seed", "99999999999999999999999"], "is not from 0 to 2**63 - 1"),
        (["--seed=-1"], "is not from 0 to 2**63 - 1"),
        (["--seed", "x"], "--seed: 'x' is not a whole number"),
    ],
)
def test_numbers_out_of_range(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "t2i", "--out", "x.png", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("threshold", "best"),
    [("--min-psnr=nan", "inf"), ("--min-cosine=98", "1"), ("--max-relative-l2=-0.1", "0")],
)
def test_a_threshold_that_nothing_passes(
    threshold: str,
    best: str,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr("omniq_compile.from_pretrained", lambda *_, **__: pytest.fail("read"))
    more = ["--quantization", "int8", "--out", "c", "--prompt", "fox", threshold]
    said = f"{threshold.split('=')[1]}, which nothing passes: that of equal pictures is {best}."
    assert said in failed(capsys, "compare", "t2i", *more)


@pytest.mark.parametrize("text", ["height=0", "width=-64", "num_images_per_prompt=0"])
def test_a_size_under_1_is_refused_before_weights_are_read(
    text: str, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("omniq_compile.from_pretrained", lambda *_, **__: pytest.fail("read"))
    more = ["generate", "t2i", "--out", "x.png", "--prompt", "fox", "--argument", text]
    assert f"--argument {text}: {text.split('=')[0]} is at least 1" in failed(capsys, *more)


def truncate(folder: Path) -> None:
    (file,) = (folder / "transformer").glob("*.safetensors")
    os.truncate(file, 1000)


def rename_class(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("AuraFlowPipeline", "AuraFlowPipelin"))


def rename_component(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("AutoencoderKL", "AutoencoderK"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, "the pipeline in t2i cannot be loaded: "),
        (rename_class, "names the class 'AuraFlowPipelin', which diffusers"),
        (rename_component, "has no class `AutoencoderK`"),
    ],
)
def test_a_spoiled_pipeline_is_one_line(
    spoil: Any, words: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(copied)
    assert words in failed(capsys, "generate", "t2i", "--out", "x.png", "--prompt", "fox")


@pytest.mark.parametrize(
    "out", ["t2i", "../HERE/t2i", "link", "t2i/inside", ".", "linked/transformer"]
)
def test_quantize_never_replaces_what_it_reads(
    out: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("linked").mkdir()
    (copied / "transformer").rename("linked/transformer")
    (copied / "transformer").symlink_to(Path("linked/transformer").absolute())
    Path("link").symlink_to("t2i")
    out = out.replace("HERE", Path.cwd().name)
    before = sorted(str(path) for path in Path().rglob("*"))
    command = ["quantize", "t2i", "--quantization", QUANTIZATION, "--overwrite", "--out", out]
    assert "the original would be lost" in failed(capsys, *command)
    assert sorted(str(path) for path in Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("quantization", "removed", "words"),
    [
        ("int8", "transformer/config.json", "t2i/transformer/config.json is missing"),
        ("int8", "transformer/*.safetensors", "t2i/transformer has no weights"),
        ({"text_encoder": "int8"}, "text_encoder/config.json", "t2i/text_encoder/config.json is"),
        ({"text_encoder": "int8"}, "text_encoder/*.safetensors", "t2i/text_encoder has no weights"),
    ],
)
def test_a_component_that_lacks_files(
    quantization: Any, removed: str, words: str, copied: Path
) -> None:
    for file in copied.glob(removed):
        file.unlink()
    with pytest.raises(CheckpointError, match=words):
        check_components(copied, build_quant_config(quantization))


@pytest.mark.parametrize("folder", ["t2i", "t2i/transformer"])
def test_quantize_tries_where_it_writes_before_the_work(
    folder: str, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "omniq_compile.checkpoints.hub_download.whole_folder",
        lambda *_, **__: pytest.fail("weights were asked for"),
    )
    Path("made").mkdir()
    Path("made/something").touch()
    error = failed(capsys, "quantize", folder, "--quantization", json.dumps(SMALL), "--out", "made")
    assert error.startswith("made exists already")
    assert "--overwrite" in error


def test_a_scheduler_is_no_incomplete_model(copied: Path) -> None:
    with pytest.raises(OptionError, match="unknown component 'scheduler'"):
        check_components(copied, build_quant_config({"scheduler": "int8"}))
    left = {"scheduler": None, "tokenizer": None, "transformer": "int8"}
    assert "transformer" in check_components(copied, build_quant_config(left))


@pytest.mark.parametrize("command", ["quantize", "compare"])
def test_a_part_that_a_component_lacks_is_refused_before_the_work(
    command: str, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for work in ("pipelines.from_pretrained.load_component", "quality.comparison.warm_up"):
        monkeypatch.setattr(f"omniq_compile.{work}", lambda *_, **__: pytest.fail("done"))
    path = "text_encoder.encoder.blocks"
    how = ["--quantization", json.dumps({"text_encoder": SMALL, path: None}), "--out", "made"]
    prompt = ["--prompt", "fox"] if command == "compare" else []
    error = failed(capsys, command, "t2i", *how, *prompt)
    assert "is a UMT5EncoderModel, which has no part 'encoder.blocks'. Did you mean" in error


def test_a_model_of_transformers_is_named_through_its_pipeline(copied: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a transformers model \(UMT5EncoderModel\)"):
        load_model(copied / "text_encoder", options=SMALL)


def test_compare_keeps_an_earlier_result(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("compared").mkdir()
    Path("compared/result.json").write_text("earlier")
    command = ["compare", "t2i", "--quantization", "int8", "--out", "compared", "--prompt", "fox"]
    assert "replace it with --overwrite" in failed(capsys, *command)
    assert Path("compared/result.json").read_text() == "earlier"
    # Allowed to, it goes on to what else is wrong.
    assert "quantize no layer" in failed(capsys, *command, "--overwrite")


def test_a_video_with_a_wrong_suffix_is_said_once(tmp_path: Path) -> None:
    frames = SimpleNamespace(frames=[[np.zeros((8, 8, 3))]])
    with pytest.raises(OptionError) as raised:
        save_result(frames, tmp_path / "v.png")
    assert str(raised.value).count("--out") == 1


def test_tensors_are_saved_as_pictures(tmp_path: Path) -> None:
    images = torch.zeros(1, 3, 8, 16, dtype=torch.bfloat16)
    (file,) = save_result(SimpleNamespace(images=images), tmp_path / "x.png")
    from PIL import Image

    assert Image.open(file).size == (16, 8)


def test_what_torchao_lacks_is_no_news(copied: Path) -> None:
    pytest.importorskip("torchao")
    # As this command imports it; the warnings come with the first import in a process.
    command = [sys.executable, "-m", "omniq_compile", "generate", ".", "--out", "x.png"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stderr == "omniq generate: error: model_index.json is missing.\n"


@pytest.mark.parametrize("command", ["generate", "compare", "quantize"])
@pytest.mark.parametrize("given", [["--min-features", "1"], ["--min_features=1"]])
def test_an_option_of_a_method_is_told_its_place(
    command: str, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, "folder", "--quantization", "int8", "--out", "x"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, *given])
    assert stopped.value.code == 2
    *_, said = capsys.readouterr().err.splitlines()
    unknown = f"omniq {command}: error: unrecognized arguments: {' '.join(given)}"
    place = """--quantization '{"transformer": {"method": "int8", "min_features": ...}}'."""
    assert said == f"{unknown}. An option of a method stands in {place}"
    with pytest.raises(SystemExit):
        main([*words, "--minimal", "1"])
    *_, said = capsys.readouterr().err.splitlines()
    assert said == f"omniq {command}: error: unrecognized arguments: --minimal 1"


def test_the_version_and_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"omniq {__version__}\n"
    command = [sys.executable, "-m", "omniq_compile", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"omniq {__version__}\n"
