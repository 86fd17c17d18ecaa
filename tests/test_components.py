"""Routing: which options each component of a pipeline gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from omniq_compile import OptionError, build_quant_config
from omniq_compile.checkpoints.checkpoint_folder import pipeline_components

FLUX = ("transformer", "text_encoder", "text_encoder_2", "vae")
WAN = ("transformer", "transformer_2", "text_encoder", "vae")


def routed(quantization: Any, components: tuple[str, ...]) -> dict[str, str]:
    config = build_quant_config(quantization)
    config.check(components)
    options = {name: config.options_for(name) for name in components}
    return {name: given["method"] for name, given in options.items() if given}


@pytest.mark.parametrize(
    ("quantization", "components", "expected"),
    [
        ("FP8", FLUX, {"transformer": "FP8"}),
        ({"method": "int8"}, FLUX, {"transformer": "int8"}),
        ("int8", WAN, {"transformer": "int8", "transformer_2": "int8"}),
        ({"transformer": "fp8"}, WAN, {"transformer": "fp8"}),
        ({"transformer": "fp8", "transformer_2": "mxfp4"}, WAN,
         {"transformer": "fp8", "transformer_2": "mxfp4"}),
        ({"transformer": {"method": "fp8"}, "vae": None}, FLUX, {"transformer": "fp8"}),
        ({"default": "int8", "vae": None}, FLUX,
         {"transformer": "int8", "text_encoder": "int8", "text_encoder_2": "int8"}),
        ({"text_encoder": "int8"}, FLUX, {"text_encoder": "int8"}),
        ({"default": None, "transformer": "mxfp8"}, WAN, {"transformer": "mxfp8"}),
    ],
)  # fmt: skip
def test_routes(quantization: Any, components: tuple[str, ...], expected: Any) -> None:
    assert routed(quantization, components) == expected


def test_a_part_of_a_component_is_left_alone() -> None:
    config = build_quant_config(
        {
            "transformer": {"method": "fp8", "ignored_layers": ["img_mod"]},
            "transformer.proj_out": None,
        }
    )
    assert config.options_for("transformer") == {
        "method": "fp8",
        "ignored_layers": ["img_mod", r"re:proj_out(\..*)?"],
    }
    assert config.options_for("transformer_2") is None


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ("int9", "unknown method 'int9'. Did you mean 'int8'"),
        ({"method": "int8", "ignored": []}, "unknown option 'ignored'"),
        ({"transformer": {"method": "fp9"}}, "quantization of 'transformer': unknown method"),
        ({"transformer": 8}, "quantization of 'transformer' must be a method"),
        (8, "quantization must be a method"),
        ({}, "quantization must be a method"),
        ({"transformer": "fp8", "transformer.proj_out": "int8"}, "is a part of 'transformer'"),
        ({"transformer.proj_out": "int8"}, "is a part of 'transformer'"),
        (
            {"default": "fp8", "transformer.proj_out": {"method": "int8"}},
            "give it to 'transformer'",
        ),
        ({"transformer.proj_out": None}, "nothing says how to quantize the rest"),
        ({"vae": "int8", "transformer.proj_out": None}, "give a method to 'transformer'"),
        ({"default": None, "transformer.proj_out": None}, "or to 'default'"),
        ({"transformer": "fp8", "transformer.": None}, "'transformer.' is no dotted path"),
        ({"transformer": {"ignored_layers": []}}, 'omniq needs options={"method"'),
    ],
)
def test_what_is_wrong_is_named(quantization: Any, words: str) -> None:
    with pytest.raises(OptionError) as raised:
        build_quant_config(quantization)
    assert words in str(raised.value)


def test_what_a_command_line_adds_is_added_to_each_component() -> None:
    given = {"transformer": {"method": "fp8", "ignored_layers": ["img_mod"]}, "vae": None}
    config = build_quant_config(given | {"text_encoder": "int8"})
    changed = config.with_options(compiler="eager", ignored_layers=["proj_out"])
    assert changed.components == {
        "transformer": {
            "method": "fp8", "ignored_layers": ["img_mod", "proj_out"], "compiler": "eager",
        },
        "text_encoder": {"method": "int8", "ignored_layers": ["proj_out"], "compiler": "eager"},
        "vae": None,
    }  # fmt: skip
    assert config.with_options(compiler=None, ignored_layers=[]) == config


def test_unknown_components_list_the_pipelines_own() -> None:
    with pytest.raises(OptionError) as raised:
        build_quant_config({"text_encodr": "int8"}).check(FLUX)
    assert "Did you mean 'text_encoder'?" in str(raised.value)
    assert "transformer, text_encoder, text_encoder_2, vae" in str(raised.value)


@pytest.mark.parametrize("path", ["up", "up.0", "down", "up.2", "dwon", "1", "up.0.bias"])
def test_a_path_that_leads_nowhere_in_a_model(path: str) -> None:
    model = nn.Sequential()
    model.add_module("up", nn.Sequential(nn.Linear(2, 2, device="meta"), nn.GELU()))
    model.add_module("down", nn.Linear(2, 2, device="meta"))
    config = build_quant_config({"default": "int8", f"vae.{path}": None})
    config.check_parts("transformer", model)
    if path in ("up", "up.0", "down"):
        config.check_parts("vae", model)
        return
    with pytest.raises(OptionError, match=rf"has no part '{path}'.* It has: up, down\.") as raised:
        config.check_parts("vae", model)
    assert path != "dwon" or "Did you mean 'down'?" in str(raised.value)


def test_one_method_needs_one_clear_transformer() -> None:
    with pytest.raises(OptionError, match=r"a stage beside the transformer \(language_model\)"):
        build_quant_config("int8").check(("transformer", "language_model"), ["language_model"])
    with pytest.raises(OptionError, match=r"no component named transformer.*It has: unet, vae"):
        build_quant_config("int8").check(("unet", "vae"))
    with pytest.raises(OptionError, match="It has: none with weights"):
        build_quant_config("int8").check(())
    build_quant_config({"language_model": "int8"}).check(("transformer", "language_model"))


def test_a_component_is_a_library_and_a_class(tmp_path: Path) -> None:
    vae = ["diffusers", "AutoencoderKL"]
    index = {"_class_name": vae, "vae": vae, "a": [1, 2], "b": [None, None], "c": "x", "d": ["x"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert pipeline_components(tmp_path) == {"vae": tuple(vae)}
