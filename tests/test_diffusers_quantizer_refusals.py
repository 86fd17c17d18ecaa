"""Files that diffusers' own from_pretrained is given, and omniq refuses: with omniq's errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_diffusers_quantizer import SHAPING, load
from tiny_flux import tiny_flux

import omniq_compile as omniq
from omniq_compile import CheckpointError, DiffusersConfig, WeightError

Q = "transformer_blocks.0.attn.to_q"


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


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        file = folder / "diffusion_pytorch_model.safetensors"
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file, metadata)

    return damage


def describe(**about: Any) -> Callable[[Path], Any]:
    """Change what the metadata says: the version, or of one weight."""

    def damage(folder: Path) -> None:
        file = folder / "diffusion_pytorch_model.safetensors"
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        content = json.loads(metadata["omniq"])
        (content if "version" in about else content["weights"][f"{Q}.weight"]).update(about)
        metadata["omniq"] = json.dumps(content)
        safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata)

    return damage


def configure(**about: Any) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(about)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def to_pickle(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, folder / "diffusion_pytorch_model.bin")


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (edit(lambda t: t.pop(f"{Q}.weight.scale")), f"'{Q}.weight' lacks its part '{Q}.weight.scale'"),
    (edit(lambda t: t.pop(f"{Q}.bias")), f"lacks 1 of the .* FluxTransformer2DModel: {Q}.bias"),
    (edit(lambda t: t.update(extra=torch.ones(2))), "has no place for: extra"),
    (
        edit(lambda t: t.update({f"{Q}.weight.codes": torch.ones(3, 4, dtype=torch.int8)})),
        rf"'{Q}.weight.codes' is \[3, 4\] of torch.int8",
    ),
    (edit(lambda t: t.update({f"{Q}.bias": torch.ones(3)})), rf"'{Q}.bias' of .* shape \[3\]"),
    (describe(version=7), "is of version 7, and this omniq reads"),
    (describe(format="int7"), f"the description of weight '{Q}.weight' is damaged"),
    (configure(version=7), "was quantized in version 7 of omniq's format"),
    (to_pickle, "which only pickle reads"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words[:30] for _, words in DAMAGES])
def test_a_damaged_folder_gives_omniqs_own_error(
    stored: Path, damage: Any, words: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "damaged"))
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        load(folder)
    assert torch.get_default_dtype() is torch.float32
    load(stored)  # nothing of it stays behind


def test_online_refusals(plain: Path, tmp_path: Path) -> None:
    how = DiffusersConfig(**SHAPING)
    nan = Path(shutil.copytree(plain, tmp_path / "nan"))
    edit(lambda t: t[f"{Q}.weight"][0].fill_(float("nan")))(nan)
    with pytest.raises(WeightError, match=rf"layer '{Q}'.*NaN or Inf"):
        load(nan, quantization_config=how)
    foreign = Path(shutil.copytree(plain, tmp_path / "foreign"))
    edit(lambda t: t.update({f"{Q}.weight_scale": torch.ones(1)}))(foreign)
    with pytest.raises(CheckpointError, match=f"it holds '{Q}.weight_scale'"):
        load(foreign, quantization_config=how)
    with pytest.raises(ValueError, match="`low_cpu_mem_usage` cannot be False"):
        load(plain, quantization_config=how, low_cpu_mem_usage=False)


def test_an_old_diffusers_is_refused(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("diffusers.quantizers.base.DiffusersQuantizer.maybe_update_state_dict")
    monkeypatch.delattr(
        "omniq_compile.integrations.diffusers_quantizer.OmniqQuantizer.maybe_update_state_dict"
    )
    with pytest.raises(CheckpointError, match=r"needs 0\.39 or later\. Use omniq_compile\.load_m"):
        load(stored)
