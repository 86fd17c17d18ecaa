"""Quantizing while loading: the same weights, in bounded memory, from files that may be broken."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import format_oracle as oracle
import pytest
import safetensors.torch
import torch
from conftest import error
from diffusers import (
    FluxTransformer2DModel,
    OmniGenTransformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from torch import nn
from zoo.walk import RECIPES
from zoo.weights import build

import omniq_compile as omniq
from omniq_compile import (
    CheckpointError,
    DiffusersConfig,
    OptionError,
    QuantizedTensor,
    WeightError,
)
from omniq_compile.models.random_models import make_inputs, random_model

OPTIONS = {"method": "int8", "min_features": 64}
METHODS: list[dict[str, Any]] = [
    {"method": "int8"},
    {"method": "fp8", "weight_block_size": [128, 128]},
    {"method": "mxfp8", "ignored_layers": ["img_mod"]},
    {"method": "mxfp4", "mxfp4_scale_alg": 2},
    {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "transformer"
    random_model("QwenImageTransformer2DModel", "tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "transformer"))


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = (omniq.flatten_state(m.state_dict())[0] for m in (a, b))
    assert list(left) == list(right)
    return all(oracle.same_bits(left[name], right[name]) for name in left)


@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
def test_equal_to_quantizing_the_loaded_model(saved: Path, options: dict[str, Any]) -> None:
    options = options | {"min_features": 64}
    loaded = omniq.load_model(QwenImageTransformer2DModel, saved, options=options)
    plain = QwenImageTransformer2DModel.from_pretrained(saved, torch_dtype=torch.bfloat16)
    omniq.quantize_(plain, options)
    assert same(loaded, plain)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    inputs = make_inputs(loaded, image_tokens=16, text_tokens=8)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], plain(**inputs)[0])


def test_layers_that_the_class_keeps_in_float32(tmp_path: Path) -> None:
    random_model("WanTransformer3DModel", "tiny").save_pretrained(tmp_path)
    loaded = omniq.load_model(tmp_path, options=OPTIONS)
    plain = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in plain.named_parameters()}
    assert {name: p.dtype for name, p in loaded.named_parameters()} == dtypes
    assert torch.float32 in dtypes.values()
    omniq.quantize_(plain, OPTIONS)
    assert same(loaded, plain)


def test_buffers_of_files_are_cast_as_diffusers_casts_them(tmp_path: Path) -> None:
    """OmniGen multiplies a sum with its table of positions, which is float32 until it is loaded."""
    plain = build(OmniGenTransformer2DModel, RECIPES["OmniGenTransformer2DModel"].config)
    plain.save_pretrained(tmp_path / "plain")
    omniq.quantize_(plain, OPTIONS)
    loaded = omniq.load_model(tmp_path / "plain", options=OPTIONS)
    assert same(loaded, plain)
    assert loaded.patch_embedding.pos_embed.dtype is torch.bfloat16
    assert loaded.rope.inv_freq.dtype is torch.float32  # which no file has
    loaded.save_pretrained(tmp_path / "stored")
    for given in (None, torch.float32):
        stored = omniq.load_model(tmp_path / "stored", dtype=given)
        online = omniq.load_model(tmp_path / "plain", options=OPTIONS, dtype=given)
        assert {n: t.dtype for n, t in stored.state_dict().items()} == {
            n: t.dtype for n, t in online.state_dict().items()
        }
        online.save_pretrained(tmp_path / "of another dtype")
    assert same(omniq.load_model(tmp_path / "of another dtype"), loaded)
    theirs = OmniGenTransformer2DModel.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, quantization_config=DiffusersConfig(**OPTIONS)
    )
    assert same(theirs, plain)


@pytest.mark.parametrize("size", ["100MB", "300KB"])
def test_saved_and_loaded_again(saved: Path, tmp_path: Path, size: str) -> None:
    options = {"method": "mxfp4", "min_features": 64}
    loaded = omniq.load_model(saved, options=options)
    loaded.save_pretrained(tmp_path / "a", max_shard_size=size)
    assert (len(list((tmp_path / "a").glob("*.safetensors"))) > 1) == (size == "300KB")
    again = omniq.load_model(tmp_path / "a")
    assert same(again, loaded)
    assert same(omniq.load_model(tmp_path / "a", options=options), loaded)
    omniq.save_model(again, tmp_path / "b")
    assert same(omniq.load_model(QwenImageTransformer2DModel, tmp_path / "b"), loaded)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"method": "fp8"}, "is quantized to mxfp4, and the options ask for fp8"),
        ({"mxfp4_scale_alg": 2}, "is quantized to mxfp4, and the options ask for mxfp4_uos"),
        ({"min_features": 16}, "with min_features = 64, and the options ask for 16"),
        ({"ignored_layers": ["to_q"]}, r"ignored_layers = \['img_mod', 'txt_mod'\], and the"),
    ],
)
def test_options_that_a_stored_model_was_not_made_with(
    saved: Path, tmp_path: Path, asked: dict[str, Any], words: str
) -> None:
    made = {"method": "mxfp4", "min_features": 64, "ignored_layers": ["img_mod", "txt_mod"]}
    omniq.load_model(saved, options=made).save_pretrained(tmp_path)
    for same_options in (
        made,
        {"method": "mxfp4"},
        {**made, "ignored_layers": ["txt_mod", "img_mod"]},
    ):
        omniq.load_model(tmp_path, options=same_options)
    with pytest.raises(OptionError, match=words):
        omniq.load_model(tmp_path, options={"method": "mxfp4", **asked})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_stored_model_is_loaded_in_the_dtype_that_is_asked_for(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """As the original is: what is quantized stands for values of it, and the rest is cast."""
    random_model("WanTransformer3DModel", "tiny").save_pretrained(tmp_path / "a")
    online = omniq.load_model(tmp_path / "a", options=OPTIONS, dtype=dtype)
    omniq.load_model(tmp_path / "a", options=OPTIONS).save_pretrained(tmp_path / "b")
    stored = omniq.load_model(tmp_path / "b", dtype=dtype)
    dtypes = {name: tensor.dtype for name, tensor in online.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in stored.state_dict().items()} == dtypes
    quantized = {n for n, p in stored.named_parameters() if isinstance(p, QuantizedTensor)}
    assert {stored.get_parameter(name).dtype for name in quantized} == {dtype}
    inputs = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in make_inputs(stored, image_tokens=16, text_tokens=8).items()
    }
    with torch.no_grad():
        assert stored(**inputs)[0].dtype is dtype


def test_compiled_is_the_fast_path_and_eager_decodes(saved: Path) -> None:
    options = OPTIONS | {"compiler": "eager"}
    loaded = omniq.load_model(saved, options=OPTIONS)
    plain = QwenImageTransformer2DModel.from_pretrained(saved, torch_dtype=torch.bfloat16)
    inputs = make_inputs(loaded, image_tokens=16, text_tokens=8)
    with torch.no_grad():
        expected = plain(**inputs)[0]
        assert error(loaded(**inputs)[0], expected) < 0.05
        online = torch.compile(plain.requires_grad_(False), backend="omniq", options=options)
        stored = torch.compile(loaded, backend="omniq", options=options)
        assert torch.equal(stored(**inputs)[0], online(**inputs)[0])


def test_what_users_do_to_a_loaded_model(saved: Path, tmp_path: Path) -> None:
    loaded = omniq.load_model(saved, options=OPTIONS)
    inputs = make_inputs(loaded, image_tokens=16, text_tokens=8)
    with torch.no_grad():
        expected = loaded(**inputs)[0]
        twin = copy.deepcopy(loaded)
        assert same(twin, loaded)
        twin.load_state_dict(loaded.state_dict())
        assert same(twin, loaded)
        loaded.to("cpu")
        loaded.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
        )
        assert torch.equal(loaded(**inputs)[0], expected)
    weight = loaded.transformer_blocks[0].attn.to_q.weight
    assert isinstance(weight, QuantizedTensor)
    with pytest.raises(CheckpointError, match="safetensors only"):
        twin.save_pretrained(tmp_path / "pickled", safe_serialization=False)


def truncate(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def change_header(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[:8] = (1 << 60).to_bytes(8, "little")
    file.write_bytes(content)


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "diffusion_pytorch_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file)

    return apply


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def shard(folder: Path, change: Callable[[dict[str, str]], Any] | None = None) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    file.unlink()
    names = sorted(tensors)
    places = {name: f"part-{i % 2}-of-2.safetensors" for i, name in enumerate(names)}
    for part in ("part-0-of-2.safetensors", "part-1-of-2.safetensors"):
        held = {n: tensors[n] for n in names if places[n] == part}
        safetensors.torch.save_file(held, folder / part)
    if change is not None:
        change(places)
    index = {"metadata": {}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))


def repeat(folder: Path) -> None:
    shard(folder)
    parts = [safetensors.torch.load_file(folder / f"part-{i}-of-2.safetensors") for i in (0, 1)]
    name, tensor = next(iter(parts[0].items()))
    safetensors.torch.save_file(parts[1] | {name: tensor}, folder / "part-1-of-2.safetensors")


def configure(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | changes))

    return apply


def pickled(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


Q = "transformer_blocks.0.attn.to_q"
DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (truncate, "is not a whole safetensors file"),
    (change_header, "is not a whole safetensors file"),
    (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "has no safetensors file"),
    (pickled, "which only pickle reads"),
    (edit(lambda t: t.pop(f"{Q}.weight")), f"2DModel: {Q}.weight."),
    (edit(lambda t: t.update(extra=torch.ones(2))), "has no place for: extra"),
    (edit(lambda t: t.update({f"{Q}.weight": torch.ones(3, 4)})), f"'{Q}.weight' of"),
    (
        lambda f: shard(f, lambda p: p.update({f"{Q}.weight": "part-9.safetensors"})),
        "part-9.safetensors is missing",
    ),
    (
        lambda f: shard(f, lambda p: p.update({f"{Q}.weight": "../part-0-of-2.safetensors"})),
        "not a file of its folder",
    ),
    (
        lambda f: shard(f, lambda p: p.update({"other": "part-0-of-2.safetensors"})),
        "says 'other' is in part-0-of-2.safetensors, which does not hold it. Download the",
    ),
    (
        lambda f: shard(f, lambda p: p.update({f"{Q}.weight": p[f"{Q}.bias"]})),
        f"says '{Q}.weight' is in part-",
    ),
    (repeat, "part-0-of-2.safetensors and again in"),
    (lambda f: (shard(f), (f / INDEX).write_text("{")), "of safetensors files: JSONDecodeError"),
    (lambda f: (shard(f), (f / INDEX).unlink()), "part-0-of-2.safetensors, and no index of such"),
    (lambda f: (f / "config.json").write_text("[]"), "does not hold a JSON object"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (configure(_class_name="QwenImageTransformer3D"), "mean 'QwenImageTransformer2DModel'?"),
    (
        configure(quantization_config={"quant_method": "bitsandbytes"}),
        "are quantized by bitsandbytes",
    ),
    (configure(quantization_config="int8"), "quantization_config in config.json is no JSON object"),
    (configure(quantization_config={"load_in_4bit": True}), "are quantized by bitsandbytes"),
    (configure(quantization_config={"quant_method": "modelopt"}), "nvidia-modelopt"),
    (
        configure(quantization_config={"quant_method": "compressed-tensors"}),
        "are quantized by compressed-tensors",
    ),
    (
        configure(quantization_config={"quant_method": "omniq", "version": 7}),
        "in version 7 of omniq's format",
    ),
    (lambda f: (f / "model.gguf").write_bytes(b"GGUF"), "are quantized by gguf"),
    (
        edit(lambda t: t.update({f"{Q}.weight_scale": torch.ones(1)})),
        f"it holds '{Q}.weight_scale'",
    ),
    (
        edit(lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fn)})),
        "is stored as F8_E4M3",
    ),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words[:40] for _, words in DAMAGES])
def test_a_broken_checkpoint_is_refused(folder: Path, damage: Any, words: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError) as raised:
        omniq.load_model(folder, options=OPTIONS)
    assert words in str(raised.value)


def test_a_sharded_checkpoint_is_read(folder: Path, saved: Path) -> None:
    shard(folder)
    expected = omniq.load_model(saved, options=OPTIONS)
    assert same(omniq.load_model(folder, options=OPTIONS), expected)


def test_a_weight_with_nan_names_its_layer(folder: Path) -> None:
    edit(lambda t: t[f"{Q}.weight"][0].fill_(float("nan")))(folder)
    with pytest.raises(WeightError, match=rf"layer '{Q}'.*NaN or Inf"):
        omniq.load_model(folder, options=OPTIONS)


def test_what_no_file_has_is_on_the_device_too(tmp_path: Path) -> None:
    """Wan's rotary tables are buffers that are computed and not stored."""
    random_model("WanTransformer3DModel", preset="tiny").save_pretrained(tmp_path / "plain")
    options = {"method": "int8", "min_features": 1}
    omniq.load_model(tmp_path / "plain", options=options).save_pretrained(tmp_path / "quantized")
    for folder, given in (("plain", {"options": options}), ("quantized", {})):
        loaded = omniq.load_model(tmp_path / folder, device="meta", **given)
        assert len(list(loaded.buffers())) == 2
        assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"meta"}


def test_wrong_arguments(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a QwenImageTransformer2DModel, not a FluxTransf"):
        omniq.load_model(FluxTransformer2DModel, saved, options=OPTIONS)
    with pytest.raises(OptionError, match="is not quantized: say how"):
        omniq.load_model(saved)
    with pytest.raises(OptionError, match="needs the folder"):
        omniq.load_model(QwenImageTransformer2DModel, options=OPTIONS)
    with pytest.raises(CheckpointError, match="is not a folder"):
        omniq.load_model(tmp_path / "nowhere", options=OPTIONS)
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model\.fp16\.safetensors"):
        omniq.load_model(saved, options=OPTIONS, variant="fp16")
    stranger = type("QwenImageTransformer2DModel", (nn.Module,), {})
    with pytest.raises(OptionError, match=r"and then call omniq_compile\.quantize_"):
        omniq.load_model(stranger, saved, options=OPTIONS)


def test_nothing_half_written_is_left(saved: Path, tmp_path: Path) -> None:
    loaded = omniq.load_model(saved, options=OPTIONS)
    target = tmp_path / "out"

    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    loaded.save_pretrained = fail  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"No space left on device\. Nothing was left"):
        omniq.save_model(loaded, target)
    assert list(tmp_path.iterdir()) == []
    del loaded.save_pretrained
    # What a killed run leaves is no checkpoint, and goes with the next run.
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "config.json").write_text("{")
    omniq.save_model(loaded, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match="out exists already"):
        omniq.save_model(loaded, target)
    omniq.save_model(loaded, target, overwrite=True)
    assert same(omniq.load_model(target), loaded)
