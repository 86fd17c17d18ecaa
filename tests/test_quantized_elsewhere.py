"""Quantized models in the hands of others: pickle, safetensors and accelerate."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import omniq_compile as omniq
from omniq_compile import WeightError

METHODS = ["int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale"]


def quantized(method: str = "int8") -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    options = {"method": method, "min_features": 1}
    if method == "mxfp4_dualscale":
        options["num_bf16_fallback_layers"] = 0
    omniq.quantize_(model.requires_grad_(False), options)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_pickled_model_comes_back(method: str) -> None:
    """By pickle alone, as joblib and ray send a model, and not by ``torch.save``."""
    model, x = quantized(method), torch.randn(3, 64)
    again = pickle.loads(pickle.dumps(model))
    assert again[0].weight.codes.dtype is model[0].weight.codes.dtype  # type: ignore[union-attr]
    assert torch.equal(again(x), model(x))


def by_accelerate(model: nn.Module, folder: Path) -> None:
    accelerate.Accelerator(cpu=True).save_model(model, folder)


def test_numpy_and_lists_get_the_values() -> None:
    weight = omniq.quantize(torch.randn(5, 70), "int8")
    values = weight.dequantize()
    for found in (weight.cpu().numpy(), np.asarray(weight), weight.numpy(force=True)):
        np.testing.assert_array_equal(found, values.numpy())
    assert weight.tolist() == values.tolist()


SAVING: dict[str, Callable[[nn.Module, Path], Any]] = {
    "save_model": lambda m, folder: safetensors.torch.save_model(m, str(folder / "x.safetensors")),
    "save_file": lambda m, folder: safetensors.torch.save_file(m.state_dict(), folder / "x"),
    "accelerate": by_accelerate,
}


@pytest.mark.parametrize("way", SAVING)
def test_safetensors_says_how_a_quantized_model_is_saved(way: str, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"Save .* omniq_compile\.flatten_state"):
        SAVING[way](quantized(), tmp_path)


def test_safetensors_says_how_a_quantized_model_is_filled(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).requires_grad_(False)
    safetensors.torch.save_model(plain, str(tmp_path / "x.safetensors"))
    model, x = quantized(), torch.randn(3, 64)
    with pytest.raises(
        WeightError, match=r"load_state_dict\(safetensors\.torch\.load_file\(file\)\)"
    ):
        safetensors.torch.load_model(model, tmp_path / "x.safetensors")
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "x.safetensors"))
    assert (model(x) - plain(x)).norm() < 0.02 * plain(x).norm()


def test_accelerate_says_that_values_from_the_disk_have_no_format(tmp_path: Path) -> None:
    model = quantized()
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    with pytest.raises(WeightError, match="from the disk into a model that is stored quantized"):
        model(torch.randn(3, 64))
