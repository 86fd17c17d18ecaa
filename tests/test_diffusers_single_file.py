"""diffusers' from_single_file: one file, in the names of its author or diffusers', quantized."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import error
from safetensors.torch import load_file, save_file
from test_text_encoders import same

import omniq_compile as omniq
from omniq_compile import CheckpointError, DiffusersConfig, WeightError
from omniq_compile.checkpoints.recorded_options import stored_options
from omniq_compile.integrations.single_file import SingleFile
from omniq_compile.layer_plan import count_quantized
from omniq_compile.models.random_models import make_inputs, random_model

Tensors = dict[str, torch.Tensor]
INT8 = {"method": "int8", "min_features": 16}
CONFIG = omniq.QuantConfig.from_options(INT8)
METHODS: list[dict[str, Any]] = [
    INT8,
    {
        "method": "fp8",
        "weight_block_size": [16, 16],
        "ignored_layers": ["attn1"],
        "min_features": 16,
    },
    {"method": "mxfp4", "min_features": 32},
]
Q = "transformer_blocks.0.attn.to_q.weight"


def as_it_is(tensors: Tensors) -> Tensors:
    return tensors


def of_wan(tensors: Tensors) -> Tensors:
    """Wan's own names, behind the prefix that ComfyUI gives every diffusion model."""
    renamed = [
        (r"condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
        (r"condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"^scale_shift_table", "head.modulation"),
        (r"scale_shift_table", "modulation"),
        (r"^proj_out", "head.head"),
        (r"attn1", "self_attn"),
        (r"attn2", "cross_attn"),
        (r"to_out\.0", "o"),
        (r"to_([qkv])\.", r"\1."),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
        (r"(blocks\.\d+)\.norm2", r"\1.norm-three"),
        (r"(blocks\.\d+)\.norm3", r"\1.norm2"),
        (r"norm-three", "norm3"),
    ]
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in renamed:
            name = re.sub(ours, theirs, name)
        found[f"model.diffusion_model.{name}"] = tensor
    return found


def of_z_image(tensors: Tensors) -> Tensors:
    """Z-Image's own names: q, k and v are one matrix, and one tensor is of no use."""
    found = {"norm_final.weight": torch.ones(3)}
    for name, tensor in tensors.items():
        name = re.sub(r"^all_(final_layer|x_embedder)\.2-1\.", r"\1.", name)
        name = name.replace("attention.to_out.0.", "attention.out.")
        name = re.sub(r"attention\.norm_([qk])", r"attention.\1_norm", name)
        found[name] = tensor
    for name in [name for name in found if "attention.to_q.weight" in name]:
        parts = [found.pop(name.replace("to_q", f"to_{part}")) for part in "qkv"]
        found[name.replace("to_q", "qkv")] = torch.cat(parts)
    return found


LAYOUTS = [
    ("QwenImageTransformer2DModel", as_it_is, 34),
    ("FluxTransformer2DModel", as_it_is, 50),
    ("WanTransformer3DModel", as_it_is, 24),
    ("WanTransformer3DModel", of_wan, 24),
    ("ZImageTransformer2DModel", of_z_image, 37),
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            random_model(kind, "tiny").save_pretrained(made[kind])
        return made[kind]

    return of


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def load(kind: str, file: Any, config: Path, **arguments: Any) -> Any:
    given = {"dtype": torch.bfloat16, "config": str(config)} | arguments
    return getattr(diffusers, kind).from_single_file(file, **given)


def dtypes(model: Any) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("kind", "layout", "layers"), LAYOUTS)
def test_it_is_what_load_model_makes_of_a_folder(
    kind: str, layout: Any, layers: int, folder_of: Any, tmp_path: Path
) -> None:
    folder = folder_of(kind)
    file = str(tmp_path / "model.safetensors")
    save_file(layout(tensors_of(folder)), file)
    # The file says the same as the folder, whoever reads it.
    plain = getattr(diffusers, kind).from_pretrained(folder)
    assert same(load(kind, file, folder, dtype=torch.float32), plain) == 0

    expected = omniq.load_model(folder, options=INT8)
    model = load(kind, file, folder, quantization_config=DiffusersConfig(**INT8))
    assert same(model, expected) == count_quantized(expected) == layers
    assert dtypes(model) == dtypes(expected)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert stored_options(model) == stored_options(expected)
    assert "quantization_config" not in model.config
    model.save_pretrained(tmp_path / "saved")
    assert same(omniq.load_model(tmp_path / "saved"), expected) == layers


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_methods_and_dtypes(
    options: Any, dtype: torch.dtype | None, folder_of: Any, tmp_path: Path
) -> None:
    """Wan keeps some modules in float32; without a dtype all of it is, as diffusers has it."""
    kind = "WanTransformer3DModel"
    folder = folder_of(kind)
    save_file(of_wan(tensors_of(folder)), tmp_path / "wan.safetensors")
    model = load(
        kind,
        str(tmp_path / "wan.safetensors"),
        folder,
        dtype=dtype,
        device="cpu",
        quantization_config=DiffusersConfig(**options),
    )
    expected = omniq.load_model(folder, options=options, dtype=dtype or torch.float32)
    assert same(model, expected) == count_quantized(expected) > 5
    assert dtypes(model) == dtypes(expected)
    assert (len(set(dtypes(model).values())) == 1) == (dtype is None)


def test_it_runs_and_compiles(folder_of: Any) -> None:
    kind = "QwenImageTransformer2DModel"
    folder = folder_of(kind)
    file = str(folder / "diffusion_pytorch_model.safetensors")
    model = load(kind, file, folder, quantization_config=DiffusersConfig(**INT8))
    given = make_inputs(model, image_tokens=16, text_tokens=5)
    with torch.no_grad():
        expected = omniq.load_model(folder, options=INT8)(**given)[0]
        assert torch.equal(model(**given)[0], expected)
        fast = torch.compile(model, backend="omniq", options=INT8 | {"compiler": "eager"})
        assert 0 < error(fast(**given)[0], expected) < 0.03
    assert model.dequantize() is model
    assert count_quantized(model) == 0


def test_a_state_dict_in_place_of_a_file_stays_as_it_was(folder_of: Any) -> None:
    kind = "QwenImageTransformer2DModel"
    folder = folder_of(kind)
    given = tensors_of(folder)
    model = load(kind, dict(given), folder, quantization_config=DiffusersConfig(**INT8))
    again = load(kind, given, folder, quantization_config=DiffusersConfig(**INT8))
    assert same(model, again) == 34
    original = tensors_of(folder)
    assert given.keys() == original.keys()
    assert all(torch.equal(given[name], original[name]) for name in given)


def test_nothing_to_quantize_is_said(
    folder_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = "QwenImageTransformer2DModel"
    folder = folder_of(kind)
    model = load(
        kind,
        tensors_of(folder),
        folder,
        quantization_config=DiffusersConfig("int8", min_features=10_000),
    )
    assert "nothing was quantized" in caplog.text
    assert stored_options(model) is None
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def as_fp8(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q].to(torch.float8_e4m3fn)


def with_scale(tensors: Tensors) -> None:
    tensors[Q.replace("weight", "scale_weight")] = torch.ones(1)


def without(tensors: Tensors) -> None:
    del tensors[Q], tensors["proj_out.bias"]


def narrower(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q][:, 1:].contiguous()


def broken(tensors: Tensors) -> None:
    tensors[Q][3, 5] = float("nan")


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (as_fp8, CheckpointError, f"'{Q}' is stored as .*float8_e4m3fn.*the original BF16"),
        (with_scale, CheckpointError, "it holds 'transformer_blocks.0.attn.to_q.scale_we"),
        (without, CheckpointError, rf"lacks 2 of the .* of QwenImage.*: proj_out.bias, {Q}\."),
        (narrower, CheckpointError, f"'{Q}' of the file that from_single_file loads is of shape"),
        (broken, WeightError, r"layer 'transformer_blocks.0.attn.to_q'.*NaN or Inf"),
    ],
)
def test_what_is_refused(change: Any, kind: Any, words: str, folder_of: Any) -> None:
    name = "QwenImageTransformer2DModel"
    tensors = tensors_of(folder_of(name))
    change(tensors)
    with pytest.raises(kind, match=words):
        load(name, tensors, folder_of(name), quantization_config=DiffusersConfig(**INT8))


def test_a_model_that_has_values_already_is_refused(folder_of: Any) -> None:
    """Before diffusers 0.42, which refuses it itself, and leaves quantizers out."""
    name = "QwenImageTransformer2DModel"
    given = {"quantization_config": DiffusersConfig(**INT8), "low_cpu_mem_usage": False}
    with pytest.raises((ValueError, CheckpointError), match=r"low_cpu_mem_usage.*cannot be False"):
        load(name, tensors_of(folder_of(name)), folder_of(name), **given)
    with pytest.raises(CheckpointError, match="Leave it out"):
        SingleFile(random_model(name, "tiny"), tensors_of(folder_of(name)), CONFIG)


def test_what_omniq_saved_is_loaded_by_its_folder(folder_of: Any, tmp_path: Path) -> None:
    for kind in ("QwenImageTransformer2DModel", "FluxTransformer2DModel"):
        stored = tmp_path / kind
        omniq.load_model(folder_of(kind), options=INT8).save_pretrained(stored)
        file = str(stored / "diffusion_pytorch_model.safetensors")
        with pytest.raises(CheckpointError, match="omniq quantized and saved it"):
            load(kind, file, stored, quantization_config=DiffusersConfig(**INT8))


def test_a_file_in_place_of_a_folder_is_told_what_loads_it(folder_of: Any) -> None:
    folder = folder_of("QwenImageTransformer2DModel")
    file = folder / "diffusion_pytorch_model.safetensors"
    words = r"is a file, and not a folder.*Class.from_single_file\(file, config=folder"
    for load_it in (
        lambda: omniq.load_model(file, options=INT8),
        lambda: omniq.load_model(diffusers.QwenImageTransformer2DModel, file, options=INT8),
        lambda: omniq.from_pretrained(str(file), "int8"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_it()
