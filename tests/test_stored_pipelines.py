"""Pipelines that are stored quantized, or broken, as the commands take them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import AuraFlowTransformer2DModel

import omniq_compile as omniq
from omniq_compile.checkpoints.recorded_options import options_of, options_to_run
from omniq_compile.cli import main
from omniq_compile.layer_plan import count_quantized
from omniq_compile.pipelines.call import loading_worded

pytest.importorskip("transformers")
import tiny_pipelines

KEPT = {"method": "mxfp4", "min_features": 16, "ignored_layers": ["ff"]}
ASKED = {"method": "mxfp4", "min_features": 16}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save_text_to_image(tmp_path_factory.mktemp("stored") / "t2i")


@pytest.fixture(scope="module")
def stored(pipeline: Path) -> Path:
    out = pipeline.with_name("stored")
    options = json.dumps({"transformer": KEPT})
    assert main(["quantize", str(pipeline), "--quantization", options, "--out", str(out)]) == 0
    return out


def generate(folder: Path, out: Path, *more: str) -> int:
    size = ["--steps", "1", "--argument", "height=32", "width=32"]
    return main(["generate", str(folder), "--prompt", "fox", *size, "--out", str(out), *more])


@pytest.mark.parametrize("asked", [None, {"transformer": ASKED}, {"default": ASKED}])
def test_what_was_kept_when_it_was_stored_is_kept(
    asked: Any, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options may be left out; compiled without them, those layers would be quantized as well."""
    more = [] if asked is None else ["--quantization", json.dumps(asked)]
    assert generate(stored, tmp_path / "a.png", *more) == 0
    told = capsys.readouterr().err
    quantized = count_quantized(omniq.from_pretrained(stored).transformer)
    assert f"transformer: {quantized} linear layers to mxfp4, " in told
    assert f"transformer: {quantized} linear layers to mxfp4, 0 kept" not in told


def test_a_stored_component_is_reported_as_it_is_copied(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = json.dumps({"default": ASKED})
    out = str(tmp_path / "again")
    assert main(["quantize", str(stored), "--quantization", options, "--out", out]) == 0
    told = capsys.readouterr().err
    quantized = count_quantized(omniq.from_pretrained(out).transformer)
    assert f"transformer: {quantized} linear layers to mxfp4, " in told
    assert f"transformer: {quantized} linear layers to mxfp4, 0 kept" not in told
    assert "text_encoder: " in told


OTHER = {"default": {"method": "int8", "min_features": 16}}


def test_a_default_leaves_what_is_stored_as_it_is(stored: Path, tmp_path: Path) -> None:
    options = json.dumps(OTHER)
    out = tmp_path / "again"
    assert main(["quantize", str(stored), "--quantization", options, "--out", str(out)]) == 0
    for pipe in (omniq.from_pretrained(stored, OTHER), omniq.from_pretrained(out)):
        assert options_to_run(pipe.transformer, None) == KEPT | {"mxfp4_scale_alg": 0}
        encoder = options_to_run(pipe.text_encoder, None)
        assert encoder is not None
        assert encoder["method"] == "int8"
    assert generate(stored, tmp_path / "a.png", "--eager", "--quantization", options) == 0


@pytest.mark.parametrize(
    "part", [{"transformer": OTHER["default"]}, {"transformer.proj_out": None}]
)
def test_what_is_asked_of_a_stored_component_by_name_has_to_fit(part: Any, stored: Path) -> None:
    with pytest.raises(omniq.OptionError, match=r"quantized to .*, and the options ask for int8"):
        omniq.from_pretrained(stored, OTHER | part)


def test_options_of_a_run_are_added_to_those_that_were_stored(stored: Path) -> None:
    model = omniq.from_pretrained(stored).transformer
    run = {"w4a8_fallback_steps": [0]}
    assert options_to_run(model, None) == options_to_run(model, ASKED)
    both = options_to_run(model, ASKED | run)
    assert both is not None
    assert (both["ignored_layers"], both["w4a8_fallback_steps"]) == (["ff"], [0])
    other = {"method": "fp8", "weight_block_size": [128, 128]}
    assert options_to_run(model, other) == options_to_run(model, None)


def test_a_component_without_linear_layers_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain Inductor fails with Wan's VAE."""
    folder = tiny_pipelines.save_text_to_video(tmp_path / "t2v")
    monkeypatch.setattr("omniq_compile.pipelines.call.call_worded", _no_call)
    options = json.dumps({"default": {"method": "int8", "min_features": 16}})
    with pytest.raises(_CalledError):
        generate(folder, tmp_path / "a.gif", "--quantization", options)
    told = capsys.readouterr().err
    compiled = re.findall(r"^(\w+): .*; [^;]*compile", told, re.MULTILINE)
    assert sorted(compiled) == ["text_encoder", "transformer"], told
    assert "\nwarning: vae: " in f"\n{told}"


@pytest.mark.parametrize("wrong", ["fp8", "fp9", 8])
@pytest.mark.parametrize("load", [omniq.load_model, AuraFlowTransformer2DModel.from_pretrained])
def test_a_method_that_the_codes_are_not_of(
    load: Any, wrong: str, stored: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stored / "transformer", tmp_path / "edited"))
    edited(folder, method=wrong)
    words = f"quantization_config in {folder}/config.json is damaged: .*method.*{wrong}"
    if wrong == "fp8":
        words = f"^{folder}/config.json says that method 'fp8' .* are mxfp4 .* has dtype U8"
    with pytest.raises(omniq.CheckpointError, match=words):
        load(folder)


def edited(folder: Path, **changes: Any) -> None:
    """Change by hand what a stored model's config.json says of its weights."""
    file = folder / "config.json"
    about = json.loads(file.read_text())
    about["quantization_config"] |= changes
    file.write_text(json.dumps(about))


class _CalledError(Exception):
    pass


def _no_call(*_: Any) -> Any:
    raise _CalledError


@pytest.mark.parametrize("command", ["generate", "compare", "tune"])
def test_a_file_that_is_cut_short_is_one_line(
    command: str, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a component that is not quantized, too, which transformers reads."""
    folder = Path(shutil.copytree(pipeline, tmp_path / "cut"))
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    options = ["--quantization", '{"transformer": "int8"}'] if command != "tune" else []
    needed = tiny_pipelines.required_arguments(command, tmp_path)
    assert main([command, str(folder), "--prompt", "fox", *options, *needed]) == 2
    told = capsys.readouterr().err
    assert f"omniq {command}: error: the pipeline in {folder} cannot be loaded: " in told
    assert "Traceback" not in told


@pytest.mark.parametrize("command", ["generate", "quantize"])
def test_a_configuration_that_does_not_fit_is_one_line(
    command: str, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(pipeline, tmp_path / "wrong"))
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"d_model": 128}))
    more = ["--prompt", "fox"] if command == "generate" else []
    options = ["--quantization", '{"text_encoder": {"method": "int8", "min_features": 16}}']
    assert main([command, str(folder), *more, *options, "--out", str(tmp_path / "a.png")]) == 2
    told = capsys.readouterr().err
    assert "cannot be loaded: " in told
    assert "Traceback" not in told
    assert not (tmp_path / "a.png").exists()


def test_what_omniq_says_itself_is_not_worded_again() -> None:
    with pytest.raises(omniq.OptionError, match=r"^mine$"), loading_worded("that"):
        raise omniq.OptionError("mine")
    words = r"^that cannot be loaded: a b \(RuntimeError\)$"
    with pytest.raises(omniq.OmniqError, match=words), loading_worded("that"):
        raise RuntimeError("a\nb")


def test_a_key_that_a_file_lacks_is_one_line_and_a_fault_of_omniqs_is_not() -> None:
    words = r"^that cannot be loaded: 'added_tokens' \(KeyError in .*test_stored_pipelines\)$"
    with pytest.raises(omniq.OmniqError, match=words), loading_worded("that"):
        raise KeyError("added_tokens")
    with pytest.raises(KeyError, match="method"), loading_worded("that"):
        options_of({"min_features": 16})
