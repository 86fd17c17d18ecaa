"""`omniq tune`: its measurements, its search, its promise, and that a kill loses nothing.

Which earlier run it goes on from: `test_tune_state.py`; errors and sets: `test_sensitivity.py`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error
from safetensors.torch import load_file, save_file

import omniq_compile as omniq
from omniq_compile import OptionError, QuantConfig
from omniq_compile.cli import main
from omniq_compile.models.random_models import make_inputs, random_model
from omniq_compile.quality import tuning
from omniq_compile.quality.recorded_calls import flat_output
from omniq_compile.quality.switches import Switches

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits" / "pipeline"
ON_DIGITS = [
    "--trust-remote-code", "--argument", "digits=[0,7]", "--steps", "2", "--seeds", "1",
    "--method", "int8", "--min-features", "64", "--compiler", "eager", "--calls", "1",
]  # fmt: skip


def measure_tune() -> Any:
    spec = importlib.util.spec_from_file_location("measure_tune", ROOT / "docs/measure_tune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny() -> Any:
    model = random_model("QwenImageTransformer2DModel", "tiny")
    return model, make_inputs(model, image_tokens=16, text_tokens=6)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "int8"},
        {"method": "fp8"},
        {"method": "mxfp8"},
        {"method": "mxfp4", "w4a8_fallback_layers": ["attn"]},
        {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1},
    ],
    ids=lambda o: o["method"],
)
def test_switched_layers_compute_what_compiled_ones_do(tiny: Any, options: dict[str, Any]) -> None:
    """Bit for bit with the eager compiler, on a model that was quantized as a user would."""
    model, inputs = tiny
    options = {**options, "compiler": "eager", "min_features": 32, "ignored_layers": ["img_mlp"]}
    with torch.no_grad():
        before = flat_output(model(**inputs))
        switches = Switches(model, QuantConfig.from_options(options))
        with switches.on(switches.names):
            switched = flat_output(model(**inputs))
        assert torch.equal(flat_output(model(**inputs)), before)
        other = random_model("QwenImageTransformer2DModel", "tiny")
        omniq.quantize_(other, options)
        omniq.compile(other, options)
        expected = flat_output(other(**inputs))
    assert torch.equal(switched, expected)
    assert error(switched, before) > 1e-3


def tune(out: Path, *arguments: str, folder: Path = DIGITS) -> int:
    return main(["tune", str(folder), "--out", str(out), *ON_DIGITS, *arguments])


def saved(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "tuned.json").read_text())
    return content


def two_blocks(folder: Path) -> Path:
    """Copy the digits' pipeline with two of its four blocks: most of a run is compiling them."""
    shutil.copytree(DIGITS, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 2}))
    (weights,) = (folder / "transformer").glob("*.safetensors")
    left = ("transformer_blocks.2.", "transformer_blocks.3.")
    kept = {name: t for name, t in load_file(weights).items() if not name.startswith(left)}
    save_file(kept, weights, {"format": "pt"})
    return folder


def start(out: Path, *arguments: str, folder: Path) -> subprocess.Popen[str]:
    command = ["tune", str(folder), "--out", str(out), *ON_DIGITS, *arguments]
    code = f"from omniq_compile.cli import main; raise SystemExit(main({command!r}))"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_target_is_met_by_its_list_and_a_kill_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = two_blocks(tmp_path / "two_blocks")
    process = start(tmp_path / "killed", "--target-psnr", "52", folder=folder)
    state = tmp_path / "killed" / "state.json"
    deadline = time.monotonic() + 240
    while not state.exists() or len(json.loads(state.read_text())["measured"]) < 10:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "tuned.json").exists()
    left = json.loads(state.read_text())["measured"]
    assert len(left) >= 10
    assert tune(tmp_path / "killed", "--target-psnr", "52", folder=folder) == 0
    assert f"going on from {len(left)} measurements" in " ".join(capsys.readouterr().err.split())
    assert json.loads(state.read_text())["measured"].items() > left.items()
    assert tune(tmp_path / "whole", "--target-psnr", "52", folder=folder) == 0
    assert saved(tmp_path / "killed") == saved(tmp_path / "whole")
    files = {file.name for file in (tmp_path / "killed").iterdir()}
    assert files == {"quality.png", "state.json", "tuned.json"}
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = saved(tmp_path / "whole")
    assert {row["kept"] for row in found["layers"]} == {True, False}
    assert printed == found["quantization"]
    assert (tmp_path / "whole" / "quality.png").stat().st_size > 10_000

    # The list as a user takes it: what is loaded has the bytes, and keeps no other layer.
    options = {"method": "int8", "min_features": 64, "ignored_layers": found["ignored_layers"]}
    pipe = omniq.from_pretrained(folder, options, trust_remote_code=True)
    assert sum(p.nbytes for p in pipe.transformer.state_dict().values()) == found["bytes"]
    kept = {
        f"transformer.{name.removesuffix('.weight')}"
        for name, p in pipe.transformer.named_parameters()
        if not isinstance(p, omniq.QuantizedTensor)
    }
    assert {row["layer"] for row in found["layers"] if row["kept"]} <= kept
    assert not {row["layer"] for row in found["layers"] if not row["kept"]} & kept
    # And `omniq compare` sees the promise kept.
    quantization = json.dumps(options | {"compiler": "eager"})
    common = ["--trust-remote-code", "--argument", "digits=[0,7]", "--steps", "2", "--seeds", "1"]
    command = ["compare", str(folder), "--quantization", quantization, "--min-psnr", "52"]
    assert main([*command, "--out", str(tmp_path / "compare"), *common]) == 0
    result = json.loads((tmp_path / "compare" / "result.json").read_text())
    assert result["metrics"]["psnr"]["worst"] == pytest.approx(found["verified_psnr"]["1"], abs=1)

    # The same measurements serve other goals; those that cannot be reached say so.
    assert tune(tmp_path / "whole", "--max-bytes", str(found["bytes"]), folder=folder) == 0
    assert saved(tmp_path / "whole")["bytes"] <= found["bytes"]
    assert tune(tmp_path / "whole", "--max-bytes", "1000000", folder=folder) == 2
    assert "with every layer quantized the weights take 1,316,380" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_verified", lambda *_: [1.0])
        assert tune(tmp_path / "whole", "--target-psnr", "52", folder=folder) == 2
    assert "no set that leaves a layer quantized was found to reach 52" in capsys.readouterr().err
    more = ("--max-bytes", "2600000", "--seeds", "2")
    assert tune(tmp_path / "whole", *more, folder=folder) == 2
    assert "it differs in seeds" in capsys.readouterr().err
    (tmp_path / "whole" / "state.json").write_text("{")
    assert tune(tmp_path / "whole", "--target-psnr", "52", folder=folder) == 2
    assert "forget it with --restart" in capsys.readouterr().err


def test_planted_outliers_are_found_and_fixed_rules_beaten(tmp_path: Path) -> None:
    """Tuned beats keeping the MLPs, and as many bytes in model order, at no more bytes."""
    script = measure_tune()
    folder = script.plant_outliers(tmp_path / "pipeline", 64)
    options = {"method": "int8", "min_features": 64, "compiler": "eager"}
    arguments = {"digits": [0, 1, 2, 3, 4], "num_inference_steps": 2}
    silent = script.Console(quiet=True)
    rows = script.measure(
        folder, options, arguments, [0], tmp_path / "work", 4, silent, most_calls=1, curve=2
    )
    every, mlps, first, tuned, reached, more, bf16 = rows
    assert every[1] < mlps[1] < bf16[1]
    assert first[1] <= mlps[1]
    assert tuned[1] <= mlps[1]
    assert tuned[2] > max(every[2], mlps[2], first[2]) + 3
    assert reached[1] < mlps[1]
    assert reached[2] >= max(every[2], mlps[2], first[2])
    assert more[2] >= every[2] + 4
    assert more[1] - every[1] < 0.1 * (bf16[1] - every[1])
    state = json.loads((tmp_path / "work" / "state.json").read_text())["measured"]
    errors = {k.removeprefix("layer transformer."): v[0] for k, v in state.items() if "layer" in k}
    worst = sorted(errors, key=lambda k: -errors[k])[:4]
    planted = {f"transformer_blocks.{block}.{layer}" for block, layer, _ in script.PLANTED}
    assert len(planted & set(worst)) >= 3


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--target-psnr": "nan"}, "must be a positive number"),
        ({"--target-psnr": "-3"}, "must be a positive number"),
        ({"--method": "mxfp5"}, "unknown method 'mxfp5'"),
        ({"--min-features": "5000"}, "is under min_features = 5000"),
        ({"--seeds": "x"}, "--seeds 'x'"),
        ({"folder": "nowhere"}, "nowhere is not a folder"),
        ({"--out": "file"}, "--out file: file is a file. Choose another folder."),
        ({"--argument": "digits=12"}, "digits must be a list of ints"),
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
    given = dict(zip(ON_DIGITS[1::2], ON_DIGITS[2::2], strict=True))
    given = {**given, "--target-psnr": "52", "--out": "out", **changed}
    folder = given.pop("folder", str(DIGITS))
    pairs = [f"{k}={v}" if k != "--argument" else v for k, v in given.items()]
    command = [x for p in pairs for x in (["--argument", p] if not p.startswith("--") else [p])]
    assert main(["tune", folder, "--trust-remote-code", *command]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["calls", "measurements", "max-bytes"])
def test_a_number_is_a_whole_one_from_1_on(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tune(tmp_path, f"--{name}", "0")
    assert f"argument --{name}: 0 is less than 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("1000000", "with every layer quantized the weights take"),
        ("9000000", "leaves every layer in BF16: the weights take"),
    ],
)
def test_too_few_or_too_many_bytes_are_refused_before_anything_is_measured(
    limit: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "generate", lambda *a, **k: pytest.fail("it generated"))
    assert tune(tmp_path / "out", "--max-bytes", limit) == 2
    assert words in capsys.readouterr().err


def test_a_pipeline_that_is_quantized_already_cannot_be_tuned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    int8 = '{"method": "int8", "min_features": 64}'
    assert main(["quantize", str(DIGITS), "--quantization", int8, "--out", str(made)]) == 0
    command = ["tune", str(made), "--out", str(tmp_path / "out"), *ON_DIGITS]
    assert main([*command, "--target-psnr", "52"]) == 2
    assert "give the folder it was quantized from" in capsys.readouterr().err


def test_what_cannot_be_tuned_says_why(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny
    steps = QuantConfig.from_options({"method": "mxfp4", "w4a8_fallback_steps": [0]})
    with pytest.raises(OptionError, match="w4a8_fallback_steps cannot be tuned"):
        Switches(model, steps)
    assert tune(tmp_path, "--target-psnr", "52", "--matmul") == 2
