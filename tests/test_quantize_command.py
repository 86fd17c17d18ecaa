"""`omniq quantize`: what it writes loads as it is stored, whatever the folder was made of."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import omniq_compile as omniq
from omniq_compile.cli import main
from omniq_compile.pipelines import from_pretrained

pytest.importorskip("transformers")
import tiny_pipelines

SMALL = {"method": "mxfp4", "min_features": 16}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save_text_to_image(tmp_path_factory.mktemp("quantize") / "t2i")


@pytest.fixture
def copied(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(pipeline, "t2i"))


def quantize(options: object, *more: str) -> int:
    said = ["--quantization", json.dumps(options), "--out", "made"]
    return main(["quantize", "t2i", *said, *more])


def tripled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("shard", [None, "4KB"])
def test_a_variant_of_what_is_copied_has_plain_names(
    plain: bool, shard: str | None, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which else would be loaded as the plain weights, or not at all."""
    pipe = omniq.from_pretrained(copied, None)
    expected = {"vae": tripled(pipe.vae), "text_encoder": tripled(pipe.text_encoder)}
    size = {} if shard is None else {"max_shard_size": shard}
    for name, model in expected.items():
        if not plain:
            for weights in (copied / name).glob("*.safetensors"):
                weights.unlink()
        model.save_pretrained(copied / name, variant="fp16", **size)
        found = [file.name for file in (copied / name).glob("*fp16*")]
        assert (len(found) > 2) == (shard is not None)
    assert quantize({"transformer": SMALL}, "--variant", "fp16") == 0
    made = omniq.from_pretrained("made")
    for name, model in expected.items():
        assert not list(Path("made", name).glob("*fp16*"))
        state = getattr(made, name).state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("option", "value"),
    [("w4a8_fallback_layers", ["to_q"]), ("w4a8_fallback_steps", [0]), ("matmul", True)],
)
@pytest.mark.parametrize("whole", [True, False])
def test_an_option_that_is_not_stored_is_refused(
    option: str, value: object, whole: bool, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = SMALL | {option: value}
    assert quantize(options if whole else {"transformer": options}) == 2
    said = capsys.readouterr().err
    assert f"option {option!r} shapes no weight: give it to omniq generate" in said
    assert not Path("made").exists()


def test_how_to_run_is_not_stored(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize({"transformer": SMALL | {"compiler": "eager", "mode": "default"}}) == 0
    assert "not stored, as they say how a model is run: compiler, mode\n" in capsys.readouterr().err
    assert "compiler" not in Path("made", "transformer", "config.json").read_text()


def test_no_two_components_are_in_memory(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, models, alive = from_pretrained.load_component, [], []

    def watched(*given: Any, **how: Any) -> Any:
        alive.append(sum(model() is not None for model in models))
        model = load(*given, **how)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(from_pretrained, "load_component", watched)
    gc.disable()
    try:
        assert quantize({"default": SMALL}) == 0
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


@pytest.mark.parametrize("options", [{"default": "int8"}, {"vae": None}])
def test_where_nothing_is_quantized_nothing_is_written(
    options: object, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(options) == 2
    said = capsys.readouterr().err
    assert "no layer of t2i is quantized, and nothing is written" in said
    assert [path.name for path in Path().iterdir()] == ["t2i"]


def test_a_folder_that_holds_something_else_is_not_overwritten(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("made", "photos").mkdir(parents=True)
    Path("made", "photos", "a").write_text("mine")
    assert quantize({"transformer": SMALL}, "--overwrite") == 2
    assert "made holds no model, and all of it would be deleted" in capsys.readouterr().err
    assert Path("made", "photos", "a").read_text() == "mine"
    quantized = omniq.load_model("t2i", options=SMALL)
    with pytest.raises(omniq.CheckpointError, match="t2i holds a whole pipeline"):
        omniq.save_model(quantized, "t2i", overwrite=True)
    assert Path("t2i", "vae").is_dir()


def test_what_is_no_part_of_the_pipeline_is_not_copied(copied: Path) -> None:
    (copied / ".git").mkdir()
    for name in (".git/HEAD", ".gitattributes", "flux1-dev.safetensors", "README.md"):
        (copied / name).touch()
    assert quantize({"transformer": SMALL}) == 0
    made = {entry.name for entry in Path("made").iterdir()}
    assert made == {entry.name for entry in copied.iterdir()} - {
        ".git", ".gitattributes", "flux1-dev.safetensors",
    }  # fmt: skip
