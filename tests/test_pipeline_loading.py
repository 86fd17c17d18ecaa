"""Whole pipelines: `from_pretrained`, `omniq quantize` and `omniq generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import error
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from PIL import Image
from tiny_pipelines import required_arguments

import omniq_compile as omniq
from omniq_compile import CheckpointError, OptionError, QuantizedTensor
from omniq_compile.checkpoints.recorded_options import stored_options
from omniq_compile.cli import main
from omniq_compile.models.random_models import random_model

transformers = pytest.importorskip("transformers")
DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "pipeline"
INT8 = '{"transformer": {"method": "int8", "min_features": 64}}'


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with two experts, a text encoder and a VAE, all tiny and random."""
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    encoder = transformers.UMT5Config(
        vocab_size=64, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=transformers.UMT5EncoderModel(encoder).to(torch.bfloat16),
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(),
        transformer=random_model("WanTransformer3DModel", "tiny", seed=1),
        transformer_2=random_model("WanTransformer3DModel", "tiny", seed=2),
    )
    pipe.save_pretrained(folder)
    return folder


def load(folder: Path, quantization: Any) -> Any:
    return omniq.from_pretrained(folder, quantization, tokenizer=None)


def methods(pipe: Any) -> dict[str, set[str]]:
    return {
        name: {p.method for p in part.parameters() if isinstance(p, QuantizedTensor)}
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"method": "fp8", "min_features": 64},
         {"transformer": {"fp8"}, "transformer_2": {"fp8"}, "text_encoder": set(), "vae": set()}),
        ({"transformer": {"method": "mxfp4", "min_features": 64}, "vae": None,
          "text_encoder": {"method": "int8", "min_features": 32}},
         {"transformer": {"mxfp4"}, "transformer_2": set(), "text_encoder": {"int8"},
          "vae": set()}),
    ],
)  # fmt: skip
def test_each_component_gets_its_own(wan: Path, quantization: Any, expected: Any) -> None:
    pipe = load(wan, quantization)
    assert methods(pipe) == expected
    assert pipe.transformer.dtype is pipe.transformer_2.dtype is torch.bfloat16


def test_each_component_is_loaded_from_its_variant_where_it_has_one(
    wan: Path, tmp_path: Path
) -> None:
    """As diffusers does it, which loads the whole pipeline in BF16 here for comparison."""
    folder = tmp_path / "pipeline"
    shutil.copytree(wan, folder)
    for name in ("text_encoder", "transformer"):
        (file,) = (folder / name).glob("*.safetensors")
        tensors = {k: t * 3 for k, t in safetensors.torch.load_file(file).items()}
        variant = file.with_name(f"{file.stem}.fp16.safetensors")
        safetensors.torch.save_file(tensors, variant, {"format": "pt"})
    everything = {"default": {"method": "int8", "min_features": 1}, "vae": None}
    pipe = omniq.from_pretrained(folder, everything, variant="fp16", tokenizer=None)
    exact = WanPipeline.from_pretrained(
        folder, variant="fp16", tokenizer=None, torch_dtype=torch.bfloat16
    )
    for name in ("text_encoder", "transformer", "transformer_2"):
        wanted = dict(getattr(exact, name).named_parameters())
        for key, p in getattr(pipe, name).named_parameters():
            if isinstance(p, QuantizedTensor):
                assert error(p.dequantize(), wanted[key]) < 0.02, (name, key)
    with pytest.raises(CheckpointError, match=r"has weights of variant 'fp8'.*Leave variant out"):
        omniq.from_pretrained(folder, everything, variant="fp8", tokenizer=None)


def test_a_quantized_text_encoder_works_eager_and_compiled(wan: Path) -> None:
    options = {"method": "int8", "min_features": 32}
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        plain = load(wan, {"vae": None}).text_encoder(ids).last_hidden_state
        encoder = load(wan, {"text_encoder": options}).text_encoder
        assert error(encoder(ids).last_hidden_state, plain) < 0.05
        compiled = torch.compile(encoder, backend="omniq", options=options | {"compiler": "eager"})
        assert error(compiled(ids).last_hidden_state, plain) < 0.05


def test_cpu_offload_hooks_leave_the_numbers(wan: Path) -> None:
    from accelerate import cpu_offload

    pipe = load(wan, {"text_encoder": {"method": "fp8", "min_features": 32}})
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = pipe.text_encoder(ids).last_hidden_state
        cpu_offload(pipe.text_encoder, "cpu")
        assert torch.equal(pipe.text_encoder(ids).last_hidden_state, expected)


def test_a_folder_of_our_own_loads_as_it_is_stored(wan: Path, tmp_path: Path) -> None:
    """With no quantization named: what is quantized stays so, and what is not stays BF16."""
    out = tmp_path / "out"
    one = json.dumps(
        {
            "transformer": {"method": "int8", "min_features": 64},
            "text_encoder": {"method": "mxfp4", "min_features": 32, "mxfp4_scale_alg": 2},
        }
    )
    assert main(["quantize", str(wan), "--quantization", one, "--out", str(out)]) == 0
    pipe = omniq.from_pretrained(out, tokenizer=None)
    found = methods(pipe)
    assert found.pop("transformer") == {"int8"}
    assert found.pop("text_encoder") == {"mxfp4"}
    assert not any(found.values())
    assert stored_options(pipe.transformer_2) is None
    assert stored_options(pipe.transformer) == {
        "method": "int8", "ignored_layers": [], "min_features": 64
    }  # fmt: skip
    assert stored_options(pipe.text_encoder) == {
        "method": "mxfp4", "ignored_layers": [], "min_features": 32, "mxfp4_scale_alg": 2
    }  # fmt: skip
    online = load(wan, {"transformer": {"method": "int8", "min_features": 64}})
    expected = online.transformer.state_dict()
    for name, value in pipe.transformer.state_dict().items():
        if isinstance(value, QuantizedTensor):
            value, expected[name] = value.dequantize(), expected[name].dequantize()
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"transformer_3": "int8"}, "unknown component 'transformer_3'"),
        ({"scheduler": "int8"}, "Valid: text_encoder, transformer, transformer_2, vae"),
    ],
)
def test_unknown_components(wan: Path, quantization: Any, words: str) -> None:
    with pytest.raises(OptionError) as raised:
        load(wan, quantization)
    assert words in str(raised.value)


def test_a_component_whose_class_lives_in_its_pipelines_module(tmp_path: Path) -> None:
    """model_index.json says ``["ltx2", "LTX2TextConnectors"]`` of it."""
    of_each = {
        "num_attention_heads": 1, "attention_head_dim": 64, "num_layers": 1,
        "num_learnable_registers": None,
    }  # fmt: skip
    sizes = {f"{k}_connector_{n}": x for k in ("video", "audio") for n, x in of_each.items()}
    connectors = LTX2TextConnectors(
        caption_channels=64, text_proj_in_factor=2, rope_double_precision=False, **sizes
    ).to(torch.bfloat16)
    absent = dict.fromkeys(
        ["vae", "audio_vae", "text_encoder", "tokenizer", "transformer", "vocoder"]
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    LTX2Pipeline(scheduler=scheduler, connectors=connectors, **absent).save_pretrained(
        tmp_path / "plain"
    )
    options = {"connectors": {"method": "int8", "min_features": 64}}
    pipe = omniq.from_pretrained(tmp_path / "plain", options, **absent)
    assert methods(pipe) == {"connectors": {"int8"}}
    pipe.save_pretrained(tmp_path / "stored")
    arguments = ["quantize", str(tmp_path / "plain"), "--out", str(tmp_path / "command")]
    assert main([*arguments, "--quantization", json.dumps(options)]) == 0
    for name in ("stored", "command"):
        again = omniq.from_pretrained(tmp_path / name, **absent)
        assert methods(again) == {"connectors": {"int8"}}


def test_not_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        load(tmp_path, "int8")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load(tmp_path / "nowhere", "int8")


@pytest.mark.parametrize("quantization", ["int8", {"transformer": "int8"}, {"default": "int8"}])
def test_a_pipeline_without_weights(quantization: Any, wan: Path, tmp_path: Path) -> None:
    shutil.copytree(wan, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(CheckpointError, match=r"bare holds no component with weights.*Download"):
        load(tmp_path / "bare", quantization)


def test_a_language_model_beside_the_transformer_has_to_be_named(wan: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wan, tmp_path / "staged"))
    (folder / "text_encoder").rename(folder / "language_model")
    index = folder / "model_index.json"
    index.write_text(
        index.read_text()
        .replace('"text_encoder"', '"language_model"')
        .replace("UMT5EncoderModel", "UMT5ForConditionalGeneration")
    )
    with pytest.raises(OptionError, match=r"a stage beside the transformer \(language_model\)"):
        load(folder, "int8")


def test_quantize_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A quantized folder draws what quantizing at loading draws, and BF16 nearly."""
    common = ["--trust-remote-code", "--argument", "digits=[3,8]", "--steps", "3", "--eager"]

    def draw(folder: Path, quantization: str, name: str) -> np.ndarray:
        out = tmp_path / f"{name}.png"
        command = ["generate", str(folder), "--out", str(out)]
        how = ["--quantization", quantization] if quantization else []
        assert main([*command, *how, *common]) == 0
        pictures = [np.asarray(Image.open(tmp_path / f"{name}_{i}.png")) for i in range(2)]
        return np.stack(pictures).astype(float)

    made = tmp_path / "made"
    assert main(["quantize", str(DIGITS), "--quantization", INT8, "--out", str(made)]) == 0
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (made / weights).stat().st_size < 0.56 * (DIGITS / weights).stat().st_size
    online, stored = draw(DIGITS, INT8, "online"), draw(made, INT8, "stored")
    assert np.array_equal(online, stored)
    assert np.array_equal(online, draw(made, "", "as_stored"))
    assert np.abs(online - draw(DIGITS, '{"transformer": null}', "bf16")).mean() < 2
    assert online.std() > 20
    capsys.readouterr()
    assert main(["quantize", str(DIGITS), "--quantization", INT8, "--out", str(made)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_generate_compiles_the_transformer(tmp_path: Path) -> None:
    quantization = INT8.replace('"int8"', '"int8", "compiler": "eager"')
    command = ["generate", str(DIGITS), "--quantization", quantization, "--trust-remote-code"]
    out = tmp_path / "x.png"
    assert main([*command, "--argument", "digits=[5]", "--steps", "2", "--out", str(out)]) == 0
    assert Image.open(out).size == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantization", "int8", "--out", "x.png"], "needs digits: give --argument digits="),
        (["--quantization", "{", "--out", "x.png"], "is not JSON"),
        (["--quantization", "int8", "--prompt", "a", "--out", "x.png"], "DigitsPipeline 'prompt'"),
        (["--quantization", "int8", "--argument", "digits=[1", "--out", "x.png"], "not NAME=JSON"),
        (["--quantization", "int8", "--out", "no/where.png"], "No such file or directory"),
        (["--argument", "digits", "--out", "x.png"], "'digits' is not NAME=JSON"),
        (["--argument", "digits=[12]", "--eager", "--out", "x.png"],
         "DigitsPipeline refused its arguments: digits[0] is 12"),
        (["--argument", "digits=[1]", 'output_type="latent"', "--out", "x.png"],
         "unknown output_type 'latent'. Valid: pil, np, pt."),
        (["--argument", "digits=[1]", "return_dict=false", "--out", "x.png"], "return_dict=false"),
        (["--argument", "digits=[1]", "--device", "gpu", "--out", "x.png"],
         "--device 'gpu' cannot be used"),
    ],
)  # fmt: skip
def test_what_generate_cannot_do(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(DIGITS), "--trust-remote-code", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["generate", "compare", "tune"])
def test_code_that_a_folder_brings_runs_only_when_allowed(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "omniq_compile.pipelines.from_pretrained.load_model", lambda *_, **__: pytest.fail("read")
    )
    arguments = required_arguments(command, tmp_path)
    assert main([command, str(DIGITS), "--argument", "digits=[1]", *arguments]) == 2
    error = capsys.readouterr().err
    assert "brings code of its own: DigitsPipeline in pipeline.py" in error
    assert "--trust-remote-code" in error
