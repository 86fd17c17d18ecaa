"""Saving from Python: whole pipelines with quantized text encoders, adapters, and the way back."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from test_diffusers_lora import lora
from test_text_encoders import same
from tiny_flux import OPTIONS, inputs, tiny_flux
from tiny_pipelines import save_text_to_image

import omniq_compile as omniq
from omniq_compile import CheckpointError, OptionError, QuantizedTensor
from omniq_compile.checkpoints.recorded_options import stored_options
from omniq_compile.integrations.text_encoders import load_quantized
from omniq_compile.layer_plan import count_quantized

transformers = pytest.importorskip("transformers")
SMALL = {"method": "int8", "min_features": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_to_image(tmp_path_factory.mktemp("pipeline") / "t2i")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_with_a_quantized_text_encoder_is_saved_and_loaded_again(
    folder: Path, tmp_path: Path, variant: str | None
) -> None:
    pipe = omniq.from_pretrained(folder, {"transformer": SMALL, "text_encoder": SMALL})
    pipe.save_pretrained(tmp_path / "saved", variant=variant)
    again = omniq.from_pretrained(tmp_path / "saved", variant=variant)
    assert same(again.text_encoder, pipe.text_encoder) == 7
    assert same(again.transformer, pipe.transformer) > 0
    assert same(again.vae, pipe.vae) == 0
    again.save_pretrained(tmp_path / "third")  # one that was loaded as stored
    third = omniq.from_pretrained(tmp_path / "third")
    assert same(third.text_encoder, pipe.text_encoder) == 7
    assert "quantization_config" not in again.text_encoder.config.to_dict()
    with pytest.raises(OptionError, match=r"None asks for .text_encoder. in BF16\. Leave it out"):
        omniq.from_pretrained(tmp_path / "saved", {"text_encoder": None}, variant=variant)


def test_a_text_encoder_that_was_quantized_in_place_is_saved_alone(
    folder: Path, tmp_path: Path
) -> None:
    cls = transformers.UMT5EncoderModel
    encoder = cls.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
    omniq.quantize_(encoder, SMALL)
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        twin.shared.weight.zero_()
    for model, name in ((encoder, "a"), (twin, "b")):
        omniq.save_model(model, tmp_path / name)
        with pytest.raises(CheckpointError, match="exists already"):
            omniq.save_model(model, tmp_path / name)
        pipe = omniq.from_pretrained(folder, {"text_encoder": SMALL})
        pipe.text_encoder = model
        pipe.save_pretrained(tmp_path / f"pipe_{name}")
        assert same(omniq.from_pretrained(tmp_path / f"pipe_{name}").text_encoder, model) == 7
    with pytest.raises(CheckpointError, match="pickle is never used"):
        encoder.save_pretrained(tmp_path / "c", safe_serialization=False)
    with pytest.raises(CheckpointError, match="Save it to a folder, and upload"):
        encoder.save_pretrained(tmp_path / "c", push_to_hub=True)


def test_a_quantized_transformer_is_freed_with_its_last_name(folder: Path) -> None:
    """As a plain one is, without the garbage collector."""
    model = omniq.load_model(folder, options=SMALL)
    assert stored_options(model) is not None
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_without_omniq_transformers_does_not_go_on_with_random_weights(
    folder: Path, tmp_path: Path
) -> None:
    omniq.from_pretrained(folder, {"text_encoder": SMALL}).save_pretrained(tmp_path)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"omniq"', '"unheard-of"'))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.UMT5EncoderModel.from_pretrained(tmp_path / "text_encoder")


def test_a_folder_with_an_older_file_name_is_loaded(folder: Path, tmp_path: Path) -> None:
    pipe = omniq.from_pretrained(folder, {"text_encoder": SMALL})
    pipe.save_pretrained(tmp_path)
    (file,) = (tmp_path / "text_encoder").glob("*.safetensors")
    file.rename(file.with_name("model.safetensors"))
    assert same(omniq.from_pretrained(tmp_path).text_encoder, pipe.text_encoder) == 7


def test_a_model_is_not_saved_with_an_adapter_loaded(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = tiny_flux()
    state = lora(model, 1)
    omniq.quantize_(model, OPTIONS)
    model.load_lora_adapter(state, prefix=None, adapter_name="one")
    words = r"adapter \(LoRA\) is loaded on 'transformer_blocks\.0\..*unload_lora_weights"
    with pytest.raises(CheckpointError, match=words):
        omniq.save_model(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match=words):
        model.save_pretrained(tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())
    assert not (tmp_path / "a").exists()
    model.delete_adapters("one")
    model.unload_lora()
    omniq.save_model(model, tmp_path / "a")
    assert same(omniq.load_model(tmp_path / "a"), model) > 0


def test_dequantize_leads_back_to_a_plain_model(tmp_path: Path) -> None:
    model = tiny_flux()
    omniq.quantize_(model, OPTIONS)
    assert count_quantized(model)
    with torch.no_grad():
        expected = model(**inputs())[0]
        assert model.dequantize() is model
        assert not count_quantized(model)
        assert torch.equal(model(**inputs())[0], expected)
    model.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert same(again, model) == 0
    with pytest.raises(CheckpointError, match="was not quantized by omniq"):
        omniq.save_model(model, tmp_path / "no")
    omniq.quantize_(model, OPTIONS)
    omniq.save_model(model, tmp_path / "again")


def test_the_memory_footprint_is_that_of_the_codes(folder: Path) -> None:
    """By which diffusers' ComponentsManager says sizes, and chooses what to offload."""
    cls = transformers.UMT5EncoderModel
    encoder = cls.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
    for model in (tiny_flux(), encoder):
        plain = model.get_memory_footprint()
        omniq.quantize_(model, OPTIONS)
        weights = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
        # A byte of two stays of each element, and a row gets a scale in float32.
        saved = sum(weight.numel() - 4 * weight.shape[0] for weight in weights)
        assert model.get_memory_footprint() == plain - saved < 0.7 * plain
        without = model.get_memory_footprint(return_buffers=False)
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        assert model.get_memory_footprint() == without + buffers
        assert copy.deepcopy(model).dequantize().get_memory_footprint() == plain


def test_a_model_is_quantized_by_one_set_of_options() -> None:
    """Its config.json has room for one."""
    model = tiny_flux()
    first = OPTIONS | {"ignored_layers": ["attn"]}
    omniq.quantize_(model, first)
    before = stored_options(model)
    omniq.quantize_(model, first)
    for other, words in (
        (OPTIONS | {"method": "fp8"}, "quantized to int8, and the options ask for fp8"),
        (OPTIONS, r"with ignored_layers = \['attn'\], and the options ask for \[\]"),
    ):
        with pytest.raises(OptionError, match=words):
            omniq.quantize_(model, other)
    assert stored_options(model) == before is not None
    omniq.quantize_(model.dequantize(), OPTIONS)


@pytest.mark.parametrize("how", ["load_model", "load_quantized", "quantize_"])
@pytest.mark.parametrize(
    ("options", "why"),
    [({"min_features": 1 << 20}, "1048576"), ({"ignored_layers": ["re:.*"]}, "ignored by 're:")],
)
def test_a_model_of_which_nothing_is_quantized_is_none_and_a_warning_says_why(
    folder: Path, how: str, options: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"method": "int8", "min_features": 1} | options
    cls, encoder = transformers.UMT5EncoderModel, folder / "text_encoder"
    if how == "load_model":
        model: Any = omniq.load_model(folder, options=options)
    elif how == "load_quantized":
        model = load_quantized(cls, encoder, options)
    else:
        model = cls.from_pretrained(encoder, dtype=torch.bfloat16)
        omniq.quantize_(model, options)
    (record,) = [r for r in caplog.records if "nothing was quantized" in r.message]
    assert record.levelname == "WARNING"
    assert why in record.message
    assert stored_options(model) is None
    assert not hasattr(model.config, "quantization_config")
