"""transformers' own from_pretrained: what omniq saved, and what it quantizes while loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_text_encoders import clip, load_quantized, qwen_vl, qwen_with_tied_head, same, t5

import omniq_compile as omniq
from omniq_compile import CheckpointError, OptionError, WeightError
from omniq_compile.checkpoints.recorded_options import stored_options
from omniq_compile.integrations.saving_transformers import WEIGHTS
from omniq_compile.layer_plan import count_quantized
from omniq_compile.lowering.quantized_tensor import QuantizedTensor

transformers = pytest.importorskip("transformers")
OPTIONS = {"method": "mxfp8", "min_features": 16}
CODES = "encoder.block.0.layer.0.SelfAttention.q.weight.codes"
T5 = transformers.T5EncoderModel
IDS = torch.arange(2, 14).reshape(2, 6)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    t5().to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture(scope="module")
def stored(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    load_quantized(T5, plain, OPTIONS).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_transformers_keeps_in_float32_is_kept(dtype: torch.dtype, plain: Path) -> None:
    """Of T5 in float16 one layer of each block, as in `quantize_` of the loaded model."""
    expected = T5.from_pretrained(plain, dtype=dtype).requires_grad_(False)
    wide = sum(p.dtype is torch.float32 for p in expected.parameters())
    assert wide == (2 if dtype is torch.float16 else 0)
    omniq.quantize_(expected, OPTIONS)
    how = omniq.TransformersConfig(**OPTIONS)
    online = T5.from_pretrained(plain, dtype=dtype, quantization_config=how)
    assert how.options == omniq.TransformersConfig(**OPTIONS).options  # for another device next
    assert same(online, expected) == 12 - wide
    assert [p.dtype for p in online.parameters()] == [p.dtype for p in expected.parameters()]
    with torch.no_grad():
        assert torch.equal(online(input_ids=IDS)[0], expected(input_ids=IDS)[0])


@pytest.mark.parametrize(
    ("make", "linears"), [(t5, 12), (clip, 12), (qwen_with_tied_head, 14), (qwen_vl, 27)]
)
def test_stored_and_online_are_what_omniq_loads(
    make: Any, linears: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    cls = type(make())
    expected = load_quantized(cls, tmp_path / "plain", OPTIONS)
    expected.save_pretrained(tmp_path / "stored")
    how = omniq.TransformersConfig(**OPTIONS)

    def refuse(*_: Any) -> None:
        raise AssertionError("a weight was dequantized")

    with monkeypatch.context() as patch:
        patch.setattr(QuantizedTensor, "dequantize", refuse)
        stored, info = cls.from_pretrained(tmp_path / "stored", output_loading_info=True)
        online = cls.from_pretrained(tmp_path / "plain", quantization_config=how)
    assert not any(info.values()), info
    for model in (stored, online):
        assert same(model, expected) == linears == count_quantized(model)
        assert stored_options(model) == stored_options(expected)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        config = model.config.to_dict()
        assert not {"quantization_config", "transformers_weights"} & set(config)
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS)[0], expected(input_ids=IDS)[0])
    stored.save_pretrained(tmp_path / "again")
    assert same(cls.from_pretrained(tmp_path / "again"), expected) == linears


@pytest.mark.parametrize(("kept", "linears"), [(["k", "wo"], 8), (["k"], 10)])
def test_the_dtype_is_respected(kept: list[str], linears: int, plain: Path, tmp_path: Path) -> None:
    """With T5's wo, quantized or not, in float32 where the rest is float16."""
    ignored = OPTIONS | {"ignored_layers": kept}
    load_quantized(T5, plain, ignored).save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        expected = load_quantized(T5, tmp_path, None, dtype)
        model = T5.from_pretrained(tmp_path, dtype=dtype)
        found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        assert found == {name: tensor.dtype for name, tensor in expected.state_dict().items()}
        assert same(model, expected) == linears
    assert T5.from_pretrained(tmp_path).dtype is torch.bfloat16  # what config.json says


def test_dequantize_leads_to_a_plain_model(stored: Path, plain: Path, tmp_path: Path) -> None:
    in_place = T5.from_pretrained(plain)
    omniq.quantize_(in_place.requires_grad_(False), OPTIONS)
    for name, model in (("loaded", T5.from_pretrained(stored)), ("in place", in_place)):
        with torch.no_grad():
            expected = model(input_ids=IDS)[0]
            assert model.dequantize() is model
            assert count_quantized(model) == 0
            assert torch.equal(model(input_ids=IDS)[0], expected)
        assert stored_options(model) is None
        model.save_pretrained(tmp_path / name)
        assert (tmp_path / name / "model.safetensors").is_file()
        assert same(T5.from_pretrained(tmp_path / name), model) == 0
    wide = T5.from_pretrained(stored).dequantize(torch.float32)
    weight = wide.encoder.block[0].layer[0].SelfAttention.q.weight
    assert weight.dtype is torch.float32
    assert torch.equal(weight.bfloat16(), model.encoder.block[0].layer[0].SelfAttention.q.weight)


def test_a_loaded_model_works_as_any_of_omniqs(stored: Path, tmp_path: Path) -> None:
    model = T5.from_pretrained(stored)
    options = OPTIONS | {"compiler": "eager"}
    with torch.no_grad():
        expected = model(input_ids=IDS)[0]
        found = torch.compile(model, backend="omniq", options=options)(input_ids=IDS)[0]
        assert not torch.equal(found, expected)
        assert ((found - expected).norm() / expected.norm()) < 0.1
    torch.save(model, tmp_path / "whole")
    again = torch.load(tmp_path / "whole", weights_only=False)
    again.save_pretrained(tmp_path / "saved")
    assert same(T5.from_pretrained(tmp_path / "saved"), model) == 12
    assert again.half().dtype is torch.float16
    with pytest.raises(ValueError, match="is not serializable"):
        transformers.PreTrainedModel.save_pretrained(model, tmp_path / "no")


def change(folder: Path, edit: Any) -> None:
    with safetensors.safe_open(folder / WEIGHTS, "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    edit(tensors, metadata)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata)


def other_version(tensors: Any, metadata: Any) -> None:
    metadata["omniq"] = json.dumps(json.loads(metadata["omniq"]) | {"version": 7})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t, _: t.pop(CODES), f"lacks its part '{CODES}'"),
        (lambda t, _: t.pop("encoder.final_layer_norm.weight"), r"lacks 1 of the .*final_layer"),
        (lambda t, _: t.update(extra=torch.ones(2)), "has no place for: extra"),
        (lambda t, _: t.update({CODES: t[CODES][:3].clone()}), rf"'{CODES}' is \[3, 64\]"),
        (
            lambda t, _: t.update({"encoder.final_layer_norm.weight": torch.ones(3)}),
            r"'encoder.final_layer_norm.weight' of .* shape \[3\]",
        ),
        (other_version, "is of version 7, and this omniq reads"),
    ],
)
def test_a_damaged_folder_gives_omniqs_own_error(
    stored: Path, edit: Any, words: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "damaged"))
    change(folder, edit)
    with pytest.raises(CheckpointError, match=words):
        T5.from_pretrained(folder)


def test_refusals(plain: Path, stored: Path, tmp_path: Path) -> None:
    how = omniq.TransformersConfig(**OPTIONS)
    with pytest.raises(OptionError, match="Did you mean 'min_features'"):
        omniq.TransformersConfig("int8", min_feature=3)
    with pytest.raises(OptionError, match="cannot be offloaded to the disk"):
        T5.from_pretrained(stored, device_map={"": "disk"}, offload_folder=tmp_path / "off")
    model = T5.from_pretrained(plain)
    with torch.no_grad():
        model.encoder.block[1].layer[1].DenseReluDense.wo.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(WeightError, match=r"encoder\.block\.1.*wo.*holds NaN or Inf"):
        T5.from_pretrained(tmp_path / "nan", quantization_config=how)
    folder = Path(shutil.copytree(stored, tmp_path / "edited"))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("mxfp8", "fp8"))
    for load in (T5.from_pretrained, lambda folder: load_quantized(T5, folder, None)):
        with pytest.raises(CheckpointError, match=r"edited/config\.json says that method 'fp8' "):
            load(folder)
    # Which of several variants is meant transformers does not say.
    folder = Path(shutil.copytree(stored, tmp_path / "variants"))
    T5.from_pretrained(stored).save_pretrained(folder, variant="fp16")
    with pytest.raises(CheckpointError, match=r"cannot tell omniq which variant"):
        T5.from_pretrained(folder, variant="fp16")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is missing"):
        T5.from_pretrained(folder, variant="fp16")


@pytest.mark.parametrize("online", [True, False])
def test_an_automatic_device_map_knows_the_quantized_size(
    online: bool, plain: Path, stored: Path, tmp_path: Path
) -> None:
    expected = load_quantized(T5, plain, OPTIONS)
    quantized = sum(parameter.nbytes for parameter in expected.parameters())
    full = sum(2 * parameter.numel() for parameter in expected.parameters())
    folder, arguments = stored, {}
    if online:
        folder, arguments = plain, {"quantization_config": omniq.TransformersConfig(**OPTIONS)}
    assert 1.15 * quantized < 0.8 * full
    memory = {"cpu": int(1.15 * quantized)}
    model = T5.from_pretrained(folder, device_map="auto", max_memory=memory, **arguments)
    assert same(model, expected) == 12
    memory = {"cpu": int(0.8 * quantized)}
    with pytest.raises(OptionError, match="cannot be offloaded to the disk"):
        T5.from_pretrained(folder, device_map="auto", max_memory=memory, **arguments)
