"""Pictures, variants and dtypes on the command line: what they reach, and what refuses them."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import tiny_pipelines
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image, ImageSequence

import omniq_compile as omniq
from omniq_compile import QuantizedTensor
from omniq_compile.cli import main

pytest.importorskip("transformers")
INT8 = '{"method": "int8", "min_features": 32, "compiler": "eager"}'
VIDEO = [
    "--argument", "height=32", "width=32", "num_frames=5", "max_sequence_length=16",
    "--prompt", "the snow", "--steps", "2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _without_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers 0.42 calls ftfy here without having asked whether it is installed."""
    monkeypatch.setattr(pipeline_wan_i2v, "basic_clean", str.strip)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave components of `compare` eager: what reaches them is what counts here."""
    monkeypatch.setattr("omniq_compile.quality.comparison.compile_component", lambda *_: None)


@pytest.fixture(scope="module")
def image_to_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save_image_to_video(tmp_path_factory.mktemp("i2v") / "pipeline")


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save_text_to_image(tmp_path_factory.mktemp("t2i") / "pipeline")


def picture(file: Path, colour: str, mode: str = "RGB") -> Path:
    Image.new(mode, (32, 32), colour).save(file)
    return file


def frames(file: Path) -> np.ndarray:
    with Image.open(file) as video:
        return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(video)])


def test_a_video_is_generated_from_a_picture(image_to_video: Path, tmp_path: Path) -> None:
    made = []
    for colour in ("red", "blue", "blue"):
        file = picture(tmp_path / f"{colour}.png", colour)
        out = tmp_path / f"{len(made)}.gif"
        command = ["generate", str(image_to_video), "--quantization", INT8, "--eager"]
        assert main([*command, *VIDEO, "--image", str(file), "--out", str(out)]) == 0
        made.append(frames(out))
    assert not np.array_equal(made[0], made[1])
    assert np.array_equal(made[1], made[2])


@pytest.mark.usefixtures("uncompiled")
def test_compare_passes_the_picture_to_both_sides(
    image_to_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    original = WanImageToVideoPipeline.__call__

    @functools.wraps(original)
    def call(self: Any, *arguments: Any, **given: Any) -> Any:
        calls.append(given["image"])
        return original(self, *arguments, **given)

    monkeypatch.setattr(WanImageToVideoPipeline, "__call__", call)
    file = picture(tmp_path / "red.png", "red")
    out = tmp_path / "out"
    command = ["compare", str(image_to_video), "--quantization", INT8, "--seeds", "3"]
    assert main([*command, *VIDEO, "--image", str(file), "--out", str(out)]) in (0, 1)
    assert len(calls) == 4  # a warm-up and a seed on each side
    assert all(image.getpixel((0, 0)) == (255, 0, 0) for image in calls)
    result = json.loads((out / "result.json").read_text())
    assert result["images"] == {"image": [str(file)]}
    assert "image" not in result["arguments"]


@pytest.mark.parametrize("command", ["generate", "compare", "tune"])
@pytest.mark.parametrize("fault", ["missing", "a folder", "no picture", "cut off", "no argument"])
def test_what_is_refused_before_loading(
    command: str,
    fault: str,
    image_to_video: Path,
    text_to_image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(omniq, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    file = tmp_path / "x.png"
    words = f"--image {file} cannot be read as a picture"
    folder = image_to_video
    if fault == "missing":
        words = f"--image {file}: there is no such file"
    elif fault == "a folder":
        file.mkdir()
        words = f"--image {file}: there is no such file"
    elif fault == "no picture":
        file.write_text("a picture in words")
    elif fault == "cut off":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:4000])
    else:
        picture(file, "red")
        folder, words = text_to_image, "AuraFlowPipeline takes no image. Leave --image out"
    how = tiny_pipelines.required_arguments(command, tmp_path, "x.gif")
    assert main([command, str(folder), *how, "--prompt", "a", "--image", str(file)]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def pipeline_called(kind: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Any]:
    """Put a pipeline without components in a folder, and list what each call of it is given."""
    seen: list[Any] = []

    @functools.wraps(kind.__call__)
    def call(*_: Any, **given: Any) -> None:
        seen.append(given)
        raise omniq.OptionError("called")

    pipe = kind.__new__(kind)
    monkeypatch.setattr(kind, "components", {})
    monkeypatch.setattr(kind, "to", lambda self, *_: self)
    monkeypatch.setattr(kind, "__call__", call)
    monkeypatch.setattr(omniq, "from_pretrained", lambda *_, **__: pipe)
    tiny_pipelines.write_index(folder, kind.__name__)
    return seen


@pytest.mark.parametrize(
    ("name", "several"),
    [
        ("QwenImageEditPlusPipeline", True),
        ("Flux2Pipeline", True),
        ("FluxKontextPipeline", True),
        ("HunyuanVideoImageToVideoPipeline", False),
        ("LongCatImageEditPipeline", False),
    ],
)
def test_several_pictures_where_the_call_takes_a_list(
    name: str,
    several: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    seen = pipeline_called(kind, monkeypatch, tmp_path)
    red, blue = (str(picture(tmp_path / f"{c}.png", c, "RGBA")) for c in ("red", "blue"))
    ending = ".gif" if "Video" in name else ".png"
    command = ["generate", str(tmp_path), "--prompt", "", "--out", str(tmp_path / f"x{ending}")]
    assert main([*command, "--image", red]) == 2
    assert colours(seen.pop()["image"]) == "red"
    assert main([*command, "--image", red, blue]) == 2
    if several:
        assert colours(seen.pop()["image"]) == ["red", "blue"]
    else:
        assert f"{name} takes one image: give a single --image FILE." in capsys.readouterr().err
    assert not seen


def colours(given: Any) -> Any:
    if isinstance(given, list):
        return [colours(one) for one in given]
    return {(255, 0, 0): "red", (0, 0, 255): "blue"}[given.getpixel((0, 0))]


def test_pictures_reach_the_arguments_that_they_are_named_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    red, blue = (str(picture(tmp_path / f"{c}.png", c)) for c in ("red", "blue"))

    def call(kind: str, *given: str) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            seen = pipeline_called(getattr(diffusers, kind), patch, tmp_path)
            out = str(tmp_path / ("x.gif" if "Wan" in kind else "x.png"))
            command = ["generate", str(tmp_path), "--prompt", "a", "--out", out]
            assert main([*command, *given]) == 2
            (arguments,) = seen
            names = ("image", "mask_image", "control_image", "last_image", "reference_images")
            return {n: colours(arguments[n]) for n in names if n in arguments}

    apart = ("--image", red, "--image", f"mask_image={blue}")
    assert call("FluxInpaintPipeline", *apart) == {"image": "red", "mask_image": "blue"}
    together = ("--image", f"mask_image={blue}", f"image={red}")
    assert call("QwenImageInpaintPipeline", *together) == {"image": "red", "mask_image": "blue"}
    both = ("--image", f"control_image={red}", "--image", f"control_image={blue}")
    assert call("FluxControlPipeline", *both) == {"control_image": ["red", "blue"]}
    assert call("WanImageToVideoPipeline", "--image", red, f"last_image={blue}") == {
        "image": "red",
        "last_image": "blue",
    }
    # It takes lists alone.
    assert call("WanVACEPipeline", "--image", f"reference_images={red}") == {
        "reference_images": ["red"]
    }
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "mask_image=x.png", "red")
    assert call("FluxInpaintPipeline", "--image", "./mask_image=x.png", f"mask_image={blue}") == {
        "image": "red",
        "mask_image": "blue",
    }


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("FluxInpaintPipeline", ["mask_imag=RED"], "Did you mean 'mask_image'"),
        ("WanAnimatePipeline", ["RED"], "needs pose_video and face_video: give --image pose_vi"),
        (
            "FluxInpaintPipeline",
            ["RED", "prompt_2=RED"],
            "'prompt_2' of .* is no picture: give --a",
        ),
        (
            "FluxInpaintPipeline",
            ["mask_image=none.png"],
            "--image mask_image=none.png: there is no",
        ),
        (
            "WanAnimatePipeline",
            ["image=RED", "image=RED", "pose_video=RED", "face_video=RED"],
            "called",
        ),
        (
            "HunyuanVideoImageToVideoPipeline",
            ["RED", "RED"],
            "takes one image: give a single --image FILE",
        ),
        (
            "StableDiffusionGLIGENPipeline",
            ["gligen_inpaint_image=RED", "gligen_inpaint_image=RED"],
            "takes one picture as 'gligen_inpaint_image': give a single --image gligen_inpaint_im",
        ),
        ("WanVACEPipeline", ["RED"], "takes no 'image', but pictures as .*reference_images"),
    ],
)
def test_pictures_that_an_argument_does_not_take(
    kind: str,
    given: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = pipeline_called(getattr(diffusers, kind), monkeypatch, tmp_path)
    red = str(picture(tmp_path / "red.png", "red"))
    given = [text.replace("RED", red) for text in given]
    out = str(tmp_path / ("x.png" if kind.startswith(("Flux", "Stable")) else "x.gif"))
    command = ["generate", str(tmp_path), "--prompt", "a", "--out", out, "--image", *given]
    assert main(command) == 2
    assert re.search(words, capsys.readouterr().err)
    assert bool(seen) == (words == "called")


def test_an_argument_is_given_once(
    tmp_path: Path, image_to_video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = str(picture(tmp_path / "red.png", "red"))
    command = ["generate", str(image_to_video), "--out", str(tmp_path / "x.gif"), "--image", red]
    assert main([*command, "--argument", "image=1", "--prompt", "a"]) == 2
    assert "'image' is given by --image and again" in capsys.readouterr().err


def test_a_picture_that_is_needed_is_asked_for(
    image_to_video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(image_to_video), "--prompt", "", "--out", "x.gif"]) == 2
    assert "needs image: give --image FILE" in capsys.readouterr().err


@pytest.mark.usefixtures("uncompiled")
def test_variant_and_dtype_reach_what_is_loaded(
    text_to_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    original = omniq.from_pretrained

    def load(*arguments: Any, **given: Any) -> Any:
        loaded.append(original(*arguments, **given))
        return loaded[-1]

    monkeypatch.setattr(omniq, "from_pretrained", load)
    weights = text_to_image / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    triple = {name: 3 * tensor for name, tensor in tensors.items()}
    variant = weights.with_name("diffusion_pytorch_model.fp16.safetensors")
    safetensors.torch.save_file(triple, variant, {"format": "pt"})
    say = ["--argument", "height=32", "width=32", "--prompt", "a red fox", "--steps", "2"]
    out = str(tmp_path / "x.png")
    command = ["generate", str(text_to_image), "--quantization", INT8, "--eager", *say]
    assert main([*command, "--variant", "fp16", "--dtype", "float32", "--out", out]) == 0
    assert main([*command, "--out", out]) == 0
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 1 and tensor.any())
    first, second = (pipe.transformer.state_dict()[name] for pipe in loaded)
    assert first.dtype is loaded[0].vae.dtype is torch.float32
    assert second.dtype is loaded[1].vae.dtype is torch.bfloat16
    assert torch.equal(first, triple[name].float())
    assert torch.equal(second, tensors[name].bfloat16())

    made = tmp_path / "made"
    stored_as = json.dumps({k: v for k, v in json.loads(INT8).items() if k != "compiler"})
    quantize = ["quantize", str(text_to_image), "--quantization", stored_as, "--out", str(made)]
    assert main([*quantize, "--variant", "fp16", "--dtype", "float16"]) == 0
    stored = omniq.load_model(made, dtype=torch.float16)
    online = omniq.load_model(
        text_to_image, options=json.loads(INT8), variant="fp16", dtype=torch.float16
    )
    expected = online.state_dict()
    for key, value in stored.state_dict().items():
        if isinstance(value, QuantizedTensor):
            assert torch.equal(value.dequantize(), expected[key].dequantize())
        else:
            assert torch.equal(value, expected[key])
    alone = ["quantize", str(text_to_image / "transformer"), "--quantization", stored_as]
    assert main([*alone, "--variant", "fp16", "--out", str(tmp_path / "alone")]) == 0
    bias = omniq.load_model(tmp_path / "alone").state_dict()[name]
    assert torch.equal(bias, triple[name].bfloat16())

    out = str(tmp_path / "compared")
    compare = ["compare", str(text_to_image), "--quantization", INT8, "--seeds", "0", *say]
    assert main([*compare, "--variant", "fp16", "--out", out]) in (0, 1)
    for pipe in loaded[2:]:
        assert torch.equal(pipe.transformer.state_dict()[name], triple[name].bfloat16())
    assert json.loads((tmp_path / "compared" / "result.json").read_text())["variant"] == "fp16"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--variant", "fp8"], "no component of .* has weights of variant 'fp8'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_variants_and_dtypes_that_are_none(
    given: list[str], words: str, text_to_image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(text_to_image), "--prompt", "", "--out", "x.png", *given]
    try:
        code = main(command)
    except SystemExit as left:  # argparse
        code = left.code
    assert code == 2
    assert re.search(words, capsys.readouterr().err)
