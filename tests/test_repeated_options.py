"""An option that takes several values keeps all of them however often it is written."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

import pytest

from omniq_compile.cli import COMMANDS, main
from omniq_compile.cli.options import add_option_arguments, options_of

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "pipeline"


def parser_of(command: str) -> argparse.ArgumentParser:
    """A command's own parser, in which nothing is required."""
    parser = argparse.ArgumentParser()
    import_module(f"omniq_compile.cli.{command}").add_arguments(parser)
    for group in parser._mutually_exclusive_groups:
        group.required = False
    for action in parser._actions:
        action.required = False
        if not action.option_strings:
            action.nargs = "*"
    return parser


def options(command: str) -> list[argparse.Action]:
    return [a for a in parser_of(command)._actions if a.option_strings and a.nargs in ("+", "*")]


WALKED = [
    (command, action.option_strings[0]) for command in COMMANDS for action in options(command)
]


@pytest.mark.parametrize(("command", "option"), WALKED)
def test_written_twice(command: str, option: str) -> None:
    (action,) = (a for a in options(command) if option in a.option_strings)
    values = [str(value) for value in action.choices or ("a=1", "b=2", "c=3")][:3]
    written = [option, *values[:2], option, *values[2:]]
    assert getattr(parser_of(command).parse_args(written), action.dest) == values


def test_there_are_some() -> None:
    assert ("generate", "--argument") in WALKED
    assert ("compare", "--image") in WALKED
    assert ("dump", "--option") in WALKED


def test_options_of_a_method_written_twice() -> None:
    parser = argparse.ArgumentParser()
    add_option_arguments(parser)
    more = ["--option", "weight_block_size=[128,128]", "--option", 'activation_scheme="dynamic"']
    kept = ["--ignored-layers", "img_mlp", "--ignored-layers", "txt_mlp"]
    assert options_of(parser.parse_args(["--method", "fp8", *more, *kept])) == {
        "method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "ignored_layers": ["img_mlp", "txt_mlp"],
    }


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("generate", ["--argument", "height=8", "--argument", "height=16"], "gives 'height' twice"),
        ("generate", ["--prompt", "a", "--argument", 'prompt="b"'], "--prompt says 'prompt' too"),
        ("compare", ["--steps", "2", "--argument", "num_inference_steps=3"], "--steps says"),
        ("compare", ["--argument", "generator=3"], "the seed says 'generator' too"),
        ("plan", ["--min-features", "1", "--option", "min_features=9"], "--min-features says"),
        ("plan", ["--option", 'method="fp8"'], "--method says 'method' too"),
        ("plan", ["--ignored-layers", "a", "--option", "ignored_layers=[]"], "--ignored-layers"),
        ("dump", ["--target", "xpu", "--option", 'target="xpu"'], "--target says 'target' too"),
        ("quantize", ["--quantization", '{"vae": "fp8", "vae": "int8"}'], "'vae' is there twice"),
    ],
)
def test_a_value_said_in_two_ways_is_refused(
    command: str,
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    required = {
        "plan": ["QwenImageTransformer2DModel:tiny", "--method", "int8"],
        "dump": ["QwenImageTransformer2DModel:tiny", "--method", "int8"],
    }.get(command, [str(DIGITS), "--out", str(tmp_path / "out.png")])
    if command in ("generate", "compare"):
        required += ["--quantization", "int8"]
    assert main([command, *required, *words]) == 2
    assert said in capsys.readouterr().err


def test_an_option_of_one_value_that_reads_like_several(capsys: pytest.CaptureFixture[str]) -> None:
    layers = ["--layer", "img_mlp", "--layer", "txt_mlp"]
    with pytest.raises(SystemExit):
        main(["dump", "QwenImageTransformer2DModel:tiny", "--method", "int8", *layers])
    assert "--layer: it takes one value, and is given twice" in capsys.readouterr().err
