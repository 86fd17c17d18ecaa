"""Models of transformers: quantized while they load, equal to quantizing them afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import omniq_compile as omniq
from omniq_compile.checkpoints.filling import fill_stored
from omniq_compile.checkpoints.safetensors_files import SafetensorsFiles
from omniq_compile.integrations.saving_transformers import WEIGHTS, save_quantized
from omniq_compile.integrations.text_encoders import load_quantized
from omniq_compile.lowering.quantized_tensor import QuantizedTensor

transformers = pytest.importorskip("transformers")
OPTIONS = {"method": "mxfp8", "min_features": 16}

# Sizes that Qwen's configurations share.
QWEN = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=90, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4
    )
    return transformers.T5EncoderModel(config)


def clip() -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def qwen_with_tied_head() -> nn.Module:
    config = transformers.Qwen3Config(vocab_size=90, head_dim=16, tie_word_embeddings=True, **QWEN)
    return transformers.Qwen3ForCausalLM(config)


def qwen_vl() -> nn.Module:
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 90, "bos_token_id": 0, "eos_token_id": 1, **QWEN,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4,
            "out_hidden_size": 64,
        },
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def same(a: nn.Module, b: nn.Module) -> int:
    """Assert that two models hold the same tensors; returns how many are quantized."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    count = 0
    for name, x in left.items():
        y = right[name]
        assert type(x) is type(y), name
        if isinstance(x, QuantizedTensor):
            count += 1
            for p, q in zip(x.parts, y.parts, strict=True):
                assert torch.equal(p.view(torch.uint8), q.view(torch.uint8)), name
        else:
            assert torch.equal(x, y), name
    return count


@pytest.mark.parametrize(
    ("make", "linears"), [(t5, 12), (clip, 12), (qwen_with_tied_head, 14), (qwen_vl, 27)]
)
def test_streamed_stored_and_quantized_afterwards_are_the_same(
    make: Any, linears: int, tmp_path: Path
) -> None:
    original = make().to(torch.bfloat16)
    cls = type(original)
    original.save_pretrained(tmp_path / "original")
    expected = cls.from_pretrained(tmp_path / "original", dtype=torch.bfloat16).eval()
    omniq.quantize_(expected.requires_grad_(False), OPTIONS)
    streamed = load_quantized(cls, tmp_path / "original", OPTIONS)
    assert same(streamed, expected) == linears
    save_quantized(streamed, tmp_path / "stored")
    stored = load_quantized(cls, tmp_path / "stored", None)
    assert same(stored, expected) == linears
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        wanted = expected(input_ids=ids)[0]
        assert wanted.isfinite().all()
        for model in (streamed, stored):
            assert torch.equal(model(input_ids=ids)[0], wanted)


def test_a_stored_model_is_loaded_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    """As transformers does, with T5's wo in float32 where the rest is float16."""
    model = t5().to(torch.bfloat16)
    cls = type(model)
    model.save_pretrained(tmp_path / "plain")
    ignored = OPTIONS | {"ignored_layers": ["k", "wo"]}
    online = load_quantized(cls, tmp_path / "plain", ignored, torch.float16)
    save_quantized(load_quantized(cls, tmp_path / "plain", ignored), tmp_path / "stored")
    stored = load_quantized(cls, tmp_path / "stored", None, torch.float16)
    dtypes = {name: tensor.dtype for name, tensor in online.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in stored.state_dict().items()} == dtypes
    assert set(dtypes.values()) == {torch.float16, torch.float32}
    assert stored.dtype is stored.config.dtype is torch.float16


@pytest.mark.parametrize("alone", [True, False])
def test_a_variant_is_read_from_its_own_files(alone: bool, tmp_path: Path) -> None:
    cls = transformers.T5EncoderModel
    for name in ("wanted", "other"):
        model = t5().to(torch.bfloat16)  # random: another one each time
        model.save_pretrained(tmp_path / name)
        if name == "wanted":
            model.save_pretrained(tmp_path / "both", variant="fp16")
            save_quantized(load_quantized(cls, tmp_path / name, OPTIONS), tmp_path / "stored")
        elif not alone:
            model.save_pretrained(tmp_path / "both")
            save_quantized(load_quantized(cls, tmp_path / name, OPTIONS), tmp_path / "stored_other")
    expected = load_quantized(cls, tmp_path / "wanted", OPTIONS)
    streamed = load_quantized(cls, tmp_path / "both", OPTIONS, variant="fp16")
    assert same(streamed, expected) == 12
    (tmp_path / "stored" / WEIGHTS).rename(tmp_path / "stored" / "model.fp16.safetensors")
    if not alone:
        (tmp_path / "stored_other" / WEIGHTS).rename(tmp_path / "stored" / WEIGHTS)
    stored = load_quantized(cls, tmp_path / "stored", None, variant="fp16")
    assert same(stored, expected) == 12


def test_buffers_that_are_stored_keep_their_precision(tmp_path: Path) -> None:
    """Of a model of transformers, which makes them itself: float32 stays, what is lower is cast."""
    model = nn.Module()
    model.register_buffer("exact", torch.zeros(3))
    model.register_buffer("low", torch.zeros(3, dtype=torch.bfloat16))
    stored = {"exact": torch.rand(3), "low": torch.rand(3).bfloat16()}
    safetensors.torch.save_file(stored, tmp_path / WEIGHTS)
    fill_stored(model, SafetensorsFiles(tmp_path), {"method": "int8"}, torch.float16, {"": "cpu"})
    assert torch.equal(model.exact, stored["exact"])
    assert model.low.dtype is torch.float16
    assert torch.equal(model.low, stored["low"].to(torch.float16))


def test_refusals(tmp_path: Path) -> None:
    model = t5().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    cls = type(model)
    with pytest.raises(omniq.CheckpointError, match="say how with options"):
        load_quantized(cls, tmp_path / "plain", None)
    with pytest.raises(omniq.CheckpointError, match="was not quantized by omniq"):
        save_quantized(model, tmp_path / "no")
    save_quantized(load_quantized(cls, tmp_path / "plain", OPTIONS), tmp_path / "stored")
    with pytest.raises(omniq.OptionError, match="is quantized to mxfp8, and the options ask"):
        load_quantized(cls, tmp_path / "stored", {"method": "int8"})
    with torch.no_grad():
        model.encoder.block[1].layer[1].DenseReluDense.wo.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(omniq.WeightError, match=r"encoder\.block\.1.*wo.*holds NaN or Inf"):
        load_quantized(cls, tmp_path / "broken", OPTIONS)


WO = "encoder.block.1.layer.1.DenseReluDense.wo.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(WO), f"lacks 1 of the .* tensors of T5EncoderModel: {WO}"),
        (lambda t: t.pop("encoder.final_layer_norm.weight"), "lacks 1 of the .*final_layer_norm"),
        (lambda t: t.update({WO: t[WO][:32].clone()}), rf"{WO}' of .* shape \[32, 96\]"),
        (lambda t: t.update({WO: t[WO].to(torch.float8_e4m3fn)}), f"{WO}' is stored as F8_E4M3"),
        (lambda t: t.update({f"{WO}_scale": torch.ones(1)}), "are quantized already"),
    ],
)
def test_a_checkpoint_that_transformers_would_fill_up_or_cast_is_refused(
    change: Any, words: str, tmp_path: Path
) -> None:
    """transformers gives random values to what is missing, and takes any codes for weights."""
    t5().to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(omniq.CheckpointError, match=words):
        load_quantized(transformers.T5EncoderModel, tmp_path, OPTIONS)


def test_a_stored_language_model_keeps_its_generation_config(tmp_path: Path) -> None:
    model = qwen_with_tied_head().to(torch.bfloat16)
    model.generation_config.update(do_sample=True, repetition_penalty=1.5, eos_token_id=[3, 4])
    model.save_pretrained(tmp_path / "plain")
    streamed = load_quantized(type(model), tmp_path / "plain", OPTIONS)
    save_quantized(streamed, tmp_path / "stored")
    stored = load_quantized(type(model), tmp_path / "stored", None)
    expected = transformers.GenerationConfig.from_pretrained(tmp_path / "plain").to_dict()
    assert stored.generation_config.to_dict() == expected


# Peak of memory that is the process's own: transformers keeps its files mapped while it loads, and
# clean pages of a file are the system's to drop.
PEAK = """
import json, sys, threading, torch, transformers
from pathlib import Path
from omniq_compile.integrations.text_encoders import load_quantized

def own():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

load_quantized(transformers.T5EncoderModel, Path(sys.argv[2]), {"method": "int8"})
before, seen, done = own(), [], threading.Event()

def watch():
    while not done.wait(0.002):
        seen.append(own())

thread = threading.Thread(target=watch)
thread.start()
model = load_quantized(transformers.T5EncoderModel, Path(sys.argv[1]), {"method": "int8"})
done.set()
thread.join()
sizes = [(p.nbytes, p.numel() * 2) for p in model.parameters()]
print(json.dumps([max(seen) - before, sum(n for n, _ in sizes), max(b for _, b in sizes)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_bfloat16_is_never_all_resident(tmp_path: Path) -> None:
    small = t5().to(torch.bfloat16)
    small.save_pretrained(tmp_path / "small")
    config = transformers.T5Config(
        vocab_size=90, d_model=2048, d_kv=64, d_ff=8192, num_layers=6, num_heads=32
    )
    with torch.device("meta"):
        large = transformers.T5EncoderModel(config).to(torch.bfloat16)
    large = large.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.fill_(0.01)
    large.save_pretrained(tmp_path / "large")
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "large"), str(tmp_path / "small")],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    peak, quantized, largest = json.loads(ran.stdout.splitlines()[-1])
    print(f"peak {peak / 1e6:.0f} MB, quantized model {quantized / 1e6:.0f} MB")
    assert quantized > 3e8
    assert peak <= 1.10 * quantized + largest
