"""What is said of a load: a misnamed keyword, diffusers' spelling of dtype, a wrong device."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny_pipelines import save_text_to_image

import omniq_compile as omniq
from omniq_compile import CheckpointError, OptionError

pytest.importorskip("transformers")
OPTIONS = {"method": "int8", "min_features": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_to_image(tmp_path_factory.mktemp("pipeline") / "t2i")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"options": {"method": "int8"}}, "quantization"),
        ({"method": "int8"}, "quantization"),
        ({"quantisation": "int8"}, "quantization"),
        ({"tokeniser": None}, "tokenizer"),
        ({"revison": "main"}, "revision"),
    ],
)
def test_a_misnamed_keyword_is_refused(folder: Path, given: Any, meant: str) -> None:
    with pytest.raises(OptionError, match=f"no argument '.*' .*Did you mean '{meant}'"):
        omniq.from_pretrained(folder, **given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"option": {"method": "int8"}}, "options"),
        ({"quantization": "int8"}, "options"),
        ({"min_features": 32}, "options"),
        ({"sub_folder": "transformer"}, "subfolder"),
        ({"revison": "main"}, "revision"),
    ],
)
def test_a_misnamed_keyword_of_load_model_is_refused(folder: Path, given: Any, meant: str) -> None:
    with pytest.raises(OptionError, match=f"no argument '.*'. Did you mean '{meant}'"):
        omniq.load_model(folder, **given)


def test_what_the_pipeline_and_diffusers_take_is_taken(folder: Path) -> None:
    pipe = omniq.from_pretrained(
        folder, OPTIONS, tokenizer=None, local_files_only=True, low_cpu_mem_usage=True
    )
    assert pipe.tokenizer is None


def test_dtype_as_users_of_diffusers_write_it(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pipe = omniq.from_pretrained(folder, OPTIONS, torch_dtype=torch.float16)
        model = omniq.load_model(folder, options=OPTIONS, torch_dtype=torch.float16)
    for module in (pipe.transformer, pipe.vae, model):
        assert {p.dtype for p in module.parameters()} == {torch.float16}
    same = omniq.load_model(folder, options=OPTIONS, dtype=torch.float32, torch_dtype=torch.float32)
    assert same.dtype is torch.float32


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dtype": torch.float16, "torch_dtype": torch.bfloat16}, "Give one"),
        ({"dtype": "bfloat16"}, r"not 'bfloat16'\. Did you mean torch\.bfloat16\?"),
        ({"torch_dtype": torch.int8}, r"torch_dtype must be torch\.bf.* not torch\.int8\.$"),
        (
            {"dtype": torch.float8_e4m3fn},
            r"^dtype must be .* not torch\.float8_e4m3fn\.$",
        ),
        ({"device": "gpu"}, "'gpu' cannot be loaded on .*Did you mean 'cuda'"),
    ],
)
def test_a_dtype_or_device_that_is_none(folder: Path, given: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        omniq.load_model(folder, options=OPTIONS, **given)
    with pytest.raises(OptionError, match=words):
        omniq.from_pretrained(folder, OPTIONS, **given)


def test_one_of_several_components_of_a_class_is_to_be_named(tmp_path: Path) -> None:
    kind = ["diffusers", "WanTransformer3DModel"]
    experts = {"transformer": kind, "transformer_2": kind}
    (tmp_path / "model_index.json").write_text(json.dumps(experts))
    words = "several components of class Wan.*subfolder=.*: transformer, transformer_2"
    with pytest.raises(CheckpointError, match=words):
        omniq.load_model(WanTransformer3DModel, tmp_path, options=OPTIONS)
    for name in experts:  # then it is read, and there is nothing
        with pytest.raises(CheckpointError, match=f"{name} is not a folder"):
            omniq.load_model(WanTransformer3DModel, tmp_path, options=OPTIONS, subfolder=name)


def test_a_second_folder_is_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"is no class, and .* is a second folder"):
        omniq.load_model(folder / "transformer", folder, options=OPTIONS)
