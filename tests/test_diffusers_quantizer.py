"""diffusers' own from_pretrained: what omniq saved, and what it quantizes while loading."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error
from diffusers import DiffusionPipeline, FluxTransformer2DModel, WanTransformer3DModel
from diffusers.quantizers import PipelineQuantizationConfig
from test_text_encoders import same
from tiny_flux import OPTIONS, inputs, tiny_flux
from tiny_pipelines import save_text_to_image

import omniq_compile as omniq
from omniq_compile import DiffusersConfig, OptionError, WeightError
from omniq_compile.checkpoints.filling import is_inside
from omniq_compile.checkpoints.recorded_options import stored_options
from omniq_compile.layer_plan import count_quantized
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.models.random_models import random_model

SHAPING = {"method": "int8", "min_features": 16}
LAYERS = 42
Q = "transformer_blocks.0.attn.to_q"
METHODS: list[dict[str, Any]] = [
    {"method": "int8"},
    {"method": "fp8", "weight_block_size": [16, 16]},
    {"method": "mxfp8", "ignored_layers": ["attn"]},
    {"method": "mxfp4", "mxfp4_scale_alg": 2},
    {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1},
]


def load(folder: Path, **arguments: Any) -> Any:
    return FluxTransformer2DModel.from_pretrained(folder, **{"dtype": torch.bfloat16} | arguments)


def dtypes(model: Any) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_flux().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stored(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    omniq.load_model(plain, options=SHAPING).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In so many files that a weight's parts lie in different ones."""
    folder = tmp_path_factory.mktemp("sharded")
    omniq.load_model(plain, options=SHAPING).save_pretrained(folder, max_shard_size="4KB")
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    places = index["weight_map"]
    assert any(
        places[name] != places[name.removesuffix(".codes") + ".scale"]
        for name in places
        if name.endswith(".codes")
    )
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["stored", "sharded"])
def test_what_omniq_saved_is_loaded_bit_for_bit(
    kind: str, dtype: torch.dtype, request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    folder = request.getfixturevalue(kind)
    expected = omniq.load_model(folder, dtype=dtype)

    def refuse(*_: Any) -> None:
        raise AssertionError("a weight was dequantized")

    with monkeypatch.context() as patch:
        patch.setattr(QuantizedTensor, "dequantize", refuse)
        model, info = load(folder, dtype=dtype, output_loading_info=True)
    assert same(model, expected) == LAYERS
    assert dtypes(model) == dtypes(expected)
    assert set(dtypes(model).values()) == {dtype}
    assert not any(info.values()), info
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert stored_options(model) == stored_options(expected)
    with torch.no_grad():
        given = {
            name: value.to(dtype) if getattr(value, "dtype", None) is torch.bfloat16 else value
            for name, value in inputs().items()
        }
        assert torch.equal(model(**given)[0], expected(**given)[0])


def test_without_a_dtype_it_is_that_of_diffusers(plain: Path, stored: Path) -> None:
    expected = dtypes(FluxTransformer2DModel.from_pretrained(plain))
    assert dtypes(FluxTransformer2DModel.from_pretrained(stored)) == expected
    assert set(expected.values()) == {torch.float32}


@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
def test_online_is_what_load_model_makes(
    plain: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    options = options | {"min_features": 16}
    expected = omniq.load_model(plain, options=options)
    model = load(plain, quantization_config=DiffusersConfig(**options))
    assert same(model, expected) == count_quantized(expected) > 10
    assert stored_options(model) == stored_options(expected)
    model.save_pretrained(tmp_path)
    for again in (load(tmp_path), omniq.load_model(tmp_path)):
        assert same(again, expected) == count_quantized(expected)
    by_dict = load(plain, quantization_config={"quant_method": "omniq"} | options)
    assert same(by_dict, expected) == count_quantized(expected)


def test_modules_kept_in_float32_are(tmp_path: Path) -> None:
    model = random_model("WanTransformer3DModel", "tiny")
    model.save_pretrained(tmp_path / "plain")
    options = {"method": "int8", "min_features": 32}
    expected = omniq.load_model(tmp_path / "plain", options=options)
    expected.save_pretrained(tmp_path / "stored")
    assert set(dtypes(expected).values()) == {torch.bfloat16, torch.float32}
    load_wan = WanTransformer3DModel.from_pretrained
    online = load_wan(
        tmp_path / "plain", dtype=torch.bfloat16, quantization_config=DiffusersConfig(**options)
    )
    stored = load_wan(tmp_path / "stored", dtype=torch.bfloat16)
    for loaded in (online, stored):
        assert dtypes(loaded) == dtypes(expected)
        assert same(loaded, expected) == count_quantized(expected) > 0


def test_a_module_kept_in_float32_is_named_by_whole_parts() -> None:
    names = ["norm.weight", "block.norm.weight", "block.time.proj", "norms.weight", "block.pronorm"]
    names += ["block.time", "time.block.proj"]
    assert [name for name in names if is_inside(name, ["norm", "time.proj"])] == names[:3]


def test_options_are_checked_when_they_are_given() -> None:
    for options, words in (
        ({"method": "int9"}, "int9"),
        ({"method": "int8", "min_feature": 3}, "Did you mean 'min_features'"),
        ({"method": "int8", "compiler": "eager"}, "'compiler' shapes no weight: give it to torch"),
        ({"method": "int8", "weight_block_size": [8, 8]}, "is for method fp8"),
    ):
        with pytest.raises(OptionError, match=words):
            DiffusersConfig(**options)
    with pytest.raises(OptionError, match="needs options="):
        DiffusersConfig.from_dict({"quant_method": "omniq"})
    assert "'method': 'int8'" in repr(DiffusersConfig("int8").to_dict())
    assert '"method": "int8"' in repr(DiffusersConfig("int8"))


def test_a_stored_folder_keeps_its_own_options(stored: Path) -> None:
    """As diffusers does for all its methods, which it says in a warning."""
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(stored, quantization_config=DiffusersConfig("fp8"))
    assert stored_options(model)["method"] == "int8"  # type: ignore[index]


@pytest.mark.parametrize("online", [True, False])
def test_a_loaded_model_works_as_any_of_omniqs(
    plain: Path, stored: Path, online: bool, tmp_path: Path
) -> None:
    model: Any = load(stored)
    if online:
        model = load(plain, quantization_config=DiffusersConfig(**SHAPING))
    given = inputs()
    with torch.no_grad():
        expected = omniq.load_model(plain, options=SHAPING)(**given)[0]
        fast = torch.compile(model, backend="omniq", options=OPTIONS, fullgraph=True)
        found = fast(**given)[0]
        assert not torch.equal(found, expected)  # activations are quantized too
        assert error(found, expected) < 0.03
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "whole")
        for other in (twin, torch.load(tmp_path / "whole", weights_only=False)):
            folder = tmp_path / str(id(other))
            other.save_pretrained(folder)
            assert same(load(folder), model) == LAYERS
        model.to("meta")
        assert all(parameter.is_meta for parameter in model.parameters())
        assert same(twin.to("cpu"), omniq.load_model(stored)) == LAYERS
        assert twin.half().dtype is torch.float16
        with pytest.raises(WeightError, match="has no values of"):
            twin.to(torch.float8_e4m3fn)
        cpu = torch.device("cpu")
        offloaded = load(stored)
        offloaded.enable_group_offload(
            onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
        )
        assert torch.equal(offloaded(**given)[0], expected)


def test_dequantize_and_from_config_lead_to_plain_models(stored: Path, tmp_path: Path) -> None:
    model = load(stored)
    anew = FluxTransformer2DModel.from_config(model.config)
    assert stored_options(anew) is None
    assert count_quantized(anew) == 0
    anew.save_pretrained(tmp_path / "anew")
    assert model.dequantize() is model
    model.save_pretrained(tmp_path / "plain")
    for name, expected in (("anew", anew.to(torch.bfloat16)), ("plain", model)):
        assert "quantization_config" not in (tmp_path / name / "config.json").read_text()
        assert same(load(tmp_path / name), expected) == 0
    omniq.quantize_(model, SHAPING)
    assert count_quantized(model) == LAYERS


def test_a_model_too_narrow_to_quantize_stays_plain(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(plain, quantization_config=DiffusersConfig("int8"))
    assert "nothing was quantized" in caplog.text
    assert stored_options(model) is None
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert same(load(tmp_path), load(plain)) == 0


def test_pipelines_of_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_text_to_image(tmp_path / "plain")
    options = {"method": "int8", "min_features": 32}
    expected = omniq.from_pretrained(
        tmp_path / "plain", {"transformer": options, "text_encoder": options}
    )
    expected.save_pretrained(tmp_path / "stored")

    def pipeline(name: str, **arguments: Any) -> Any:
        return DiffusionPipeline.from_pretrained(tmp_path / name, dtype=torch.bfloat16, **arguments)

    def draw(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        size = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
        pictures: torch.Tensor = pipe("fox", generator=seed, output_type="pt", **size).images
        return pictures

    mapping = PipelineQuantizationConfig(
        quant_mapping={
            "transformer": DiffusersConfig(**options),
            "text_encoder": omniq.TransformersConfig(**options),
        }
    )
    named = PipelineQuantizationConfig(
        quant_backend="omniq",
        quant_kwargs=options,
        components_to_quantize=["transformer", "text_encoder"],
    )
    picture = draw(expected)
    for pipe in (
        pipeline("stored"),
        pipeline("plain", quantization_config=mapping),
        pipeline("plain", quantization_config=named),
    ):
        assert same(pipe.transformer, expected.transformer) == 36
        assert same(pipe.text_encoder, expected.text_encoder) == 7
        assert same(pipe.vae, expected.vae) == 0
        assert torch.equal(draw(pipe), picture)
    one = PipelineQuantizationConfig(quant_mapping={"transformer": DiffusersConfig(**options)})
    pipe = pipeline("plain", quantization_config=one)
    assert [count_quantized(m) for m in (pipe.transformer, pipe.text_encoder)] == [36, 0]


def test_device_maps(stored: Path, tmp_path: Path) -> None:
    expected = omniq.load_model(stored)
    assert same(load(stored, device_map="cpu"), expected) == LAYERS
    parts = {"": "cpu", "transformer_blocks.0": "meta"}
    with pytest.MonkeyPatch.context() as patch:
        # accelerate's hooks would look for the weights of the part on "meta".
        patch.setattr("diffusers.models.modeling_utils.dispatch_model", lambda model, **_: model)
        model = load(stored, device_map=parts)
        with pytest.raises(OptionError, match="names no device for 'context_embedder"):
            load(stored, device_map={"transformer_blocks.0": "cpu"})
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta == name.startswith("transformer_blocks.0."), name
    with pytest.raises(OptionError, match="cannot be offloaded to the disk"):
        load(stored, device_map={"": "disk"}, offload_folder=tmp_path)


@pytest.mark.parametrize("method", ["int8", "mxfp4"])
@pytest.mark.parametrize("online", [True, False])
def test_an_automatic_device_map_knows_the_quantized_size(
    method: str, online: bool, plain: Path, tmp_path: Path
) -> None:
    """Of a memory too small for all of BF16: what does not fit would go to the disk."""
    options = SHAPING | {"method": method}
    expected = omniq.load_model(plain, options=options)
    quantized = sum(parameter.nbytes for parameter in expected.parameters())
    full = sum(2 * parameter.numel() for parameter in expected.parameters())
    arguments: dict[str, Any] = {"quantization_config": DiffusersConfig(**options)}
    folder = plain
    if not online:
        expected.save_pretrained(tmp_path)
        arguments, folder = {}, tmp_path
    enough = 1.15 * quantized
    assert enough < 0.8 * full
    model = load(folder, device_map="auto", max_memory={"cpu": int(enough)}, **arguments)
    assert same(model, expected) == LAYERS
    with pytest.raises(OptionError, match="cannot be offloaded to the disk"):
        load(folder, device_map="auto", max_memory={"cpu": int(0.8 * quantized)}, **arguments)
