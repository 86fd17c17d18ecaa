"""`omniq plan` on the command line: its table, and what it says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from omniq_compile.cli import main
from omniq_compile.cli.plan import Size, _render
from omniq_compile.models.families import FAMILIES, InputSize, preset_config
from omniq_compile.models.random_models import random_model
from omniq_compile.planning.plan import Plan, PlanRow


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table_shows_kinds_decisions_and_totals(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ("WanTransformer3DModel:tiny", "--method", "fp8", "--target", "cuda:sm_90")
    size = ("--height", "64", "--width", "96", "--frames", "9", "--text-tokens", "10")
    keep = ("--min-features", "64", "--ignored-layers", "proj_ot")
    code, out, _ = plan(capsys, *arguments, *size, *keep)
    assert code == 0
    assert "'proj_ot' matches no layer of the model; nearest: proj_out" in caplog.text
    assert "WanTransformer3DModel:tiny: fp8 on cuda:sm_90; 96 x 64, 9 frames, 10 text" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    # 4 x 6 patches in each of 1 + 8 / 4 latent frames.
    assert "2  72 x 192 x 512  fp8" in rows["blocks.*.ffn.net.0.proj"]
    assert "cuda_fp8_few_tiles_triton" in rows["blocks.*.ffn.net.0.proj"]
    assert "kept in float32" in rows["condition_embedder.time_embedder.linear_1"]
    model = random_model("WanTransformer3DModel", "tiny")
    nbytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert f"weights: {nbytes / 2**20:.1f} MiB -> " in out
    assert "activations, estimated:" in out


def test_the_wide_latents_of_wan_have_the_tokens_of_its_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As WanPipeline calls Wan2.2-TI2V-5B: its VAE shrinks a side 16 times, and a patch twice."""
    settings = preset_config("WanTransformer3DModel", "tiny")
    config = {"_class_name": "WanTransformer3DModel", "in_channels": 48, "out_channels": 48}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | settings))
    code, out, _ = plan(capsys, str(file), "--method", "int8", "--frames", "5")
    assert code == 0
    assert "1280 x 704, 5 frames" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    tokens = 2 * (704 // 32) * (1280 // 32)
    assert f" {tokens} x 192 x 512 " in rows["blocks.*.ffn.net.0.proj"]
    assert f" {tokens} x 192 x 1152 " in rows["condition_embedder.time_proj"]
    assert plan(capsys, str(file), "--method", "int8", "--height", "720")[0] == 2


def test_pictures_given_to_an_edit_count(capsys: pytest.CaptureFixture[str]) -> None:
    model = ("FluxTransformer2DModel:tiny", "--method", "int8", "--height", "64", "--width", "96")
    shown = []
    for pictures in (1, 3):
        code, out, _ = plan(capsys, *model, "--pictures", str(pictures), "--text-tokens", "5")
        assert code == 0
        row = next(line for line in out.splitlines() if ".ff.net.0.proj" in line)
        assert f" {24 * pictures} x 192 x 768 " in row
        shown.append(out)
    assert "; 3 pictures of 96 x 64, 5 text tokens" in shown[1]
    assert "; 96 x 64, 5 text tokens" in shown[0]


def test_several_pictures_are_placed_as_pipelines_place_them() -> None:
    """As FluxKontextPipeline does, and as QwenImageEditPlusPipeline names their sizes."""
    from diffusers import FluxKontextPipeline

    drawn = InputSize(1, (4, 6), 5, torch.float32, torch.Generator().manual_seed(0), pictures=2)
    for name in ("FluxTransformer2DModel", "QwenImageTransformer2DModel"):
        model = random_model(name, "tiny", dtype=torch.float32)
        inputs = FAMILIES[name].inputs(model, drawn)
        assert inputs["hidden_states"].shape[1] == 2 * 4 * 6
        with torch.no_grad():
            (out,) = model(**inputs)
        assert out.shape == inputs["hidden_states"].shape
        if "img_ids" in inputs:
            ids = FluxKontextPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
            given = ids.clone()
            given[..., 0] = 1
            assert torch.equal(inputs["img_ids"], torch.cat([ids, given]))
        else:
            assert inputs["img_shapes"] == [[(1, 4, 6), (1, 4, 6)]]


def test_rows_and_totals_are_in_one_unit() -> None:
    row = PlanRow("up", 1, 1, 4096, 4096, "int8", "gemm", True, "", 1, 2**25, 2**24)
    text = _render(
        {"model": (Size(16, 16, 1, 1), Plan((row,), 2**24, 0, 0, 2**25, 2**24, 0, 0))}, "int8"
    )
    assert "MiB before  MiB after" in text
    assert " 32.0       16.0" in text
    assert "weights: 32.0 MiB -> 16.0 MiB" in text


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: Any) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    write("broken.json", "{")
    write("list.json", [])
    write("clip.json", {"architectures": ["CLIPTextModel"]})
    write("vae.json", {"_class_name": "AutoencoderKL"})
    write("near.json", {"_class_name": "QwenImageTransformer2DModl"})
    write("typo.json", {"_class_name": "FluxTransformer2DModel", "num_layer": 3})
    write("wrong.json", {"_class_name": "FluxTransformer2DModel", "num_layers": "many"})
    write("unet/model_index.json", {
        "_class_name": "SomePipeline", "_name_or_path": ["a", "b"],
        "unet": ["diffusers", "UNet2DConditionModel"], "transformer_2": [None, None],
    })  # fmt: skip
    write("half/model_index.json", {"transformer": ["diffusers", "FluxTransformer2DModel"]})
    write("empty/readme", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["QwenImageTransformer2DModl"],
         ["unknown transformer class", "Did you mean 'QwenImageTransformer2DModel'?"]),
        (["LTXVideoTransformer3DModel"],
         ["LTXVideoTransformer3DModel is a class of diffusers that omniq plan and dump do not"]),
        (["FluxTransformer2DModel:tinny"], ["unknown preset 'tinny'. Did you mean 'tiny'?"]),
        (["nowhere/config.json"], ["no folder or configuration nowhere/config.json"]),
        (["broken.json"], ["broken.json cannot be read: "]),
        (["list.json"], ["list.json does not hold a JSON object"]),
        (["clip.json"], ["clip.json has no _class_name"]),
        (["vae.json"], ["vae.json is of AutoencoderKL, an autoencoder, and not of a transformer"]),
        (["near.json"], ["Did you mean 'QwenImageTransformer2DModel'?"]),
        (["typo.json"], ["no setting 'num_layer'. Did you mean 'num_layers'?"]),
        (["nowhere.json"], ["no folder or configuration nowhere.json.", "Did you mean"]),
        (["wrong.json"], ["wrong.json: FluxTransformer2DModel cannot be built", "TypeError"]),
        (["unet"], ["names no transformer that omniq knows, but unet (UNet2DConditionModel);"]),
        (["half"], ["half/transformer/config.json is missing."]),
        (["empty"], ["empty has no config.json"]),
        (["FluxTransformer2DModel", "--frames", "9"], ["--frames is for video"]),
        (["FluxTransformer2DModel", "--width", "1000"], ["--width 1000 is not a multiple of 16"]),
        (["QwenImageTransformer2DModel:tiny", "--height", "1600000", "--width", "1600000"],
         ["cannot run without values", "100000"]),
        (["WanTransformer3DModel", "--frames", "8"], ["--frames 8 is not one more than"]),
        (["ZImageTransformer2DModel", "--pictures", "2"],
         ["--pictures is for QwenImageTransformer2DModel and FluxTransformer2DModel"]),
        (["FluxTransformer2DModel", "--target", "gpu"], ["unknown target device 'gpu'"]),
        (["FluxTransformer2DModel", "--out", "no/such/folder", "--text-tokens", "8", "--height",
          "32", "--width", "32"], ["cannot write 'no/such/folder': No such file or directory"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_on_stderr_and_code_2(
    files: None, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = plan(capsys, *arguments, "--method", "int8")
    assert (code, out) == (2, "")
    assert [word for word in words if word not in err] == []
    assert "omniq plan: error: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize("wrong", ["vae.json", "unet"])
def test_no_model_is_planned_before_another_is_refused(
    files: None,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("omniq_compile.cli.plan._plan", lambda *_: pytest.fail("planned"))
    code, _, err = plan(capsys, "QwenImageTransformer2DModel", wrong, "--method", "int8")
    assert code == 2
    assert wrong in err


@pytest.mark.parametrize("name", ["height", "width", "frames", "pictures", "text-tokens"])
def test_a_size_is_a_whole_number_from_1_on(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value, words in (("0", "0 is less than 1"), ("1.5", "'1.5' is not a whole number")):
        with pytest.raises(SystemExit):
            main(["plan", "WanTransformer3DModel", "--method", "int8", f"--{name}", value])
        assert f"argument --{name}: {words}" in capsys.readouterr().err
