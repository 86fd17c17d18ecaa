"""The examples, each on a tiny pipeline of its family, beside the same pipeline in BF16."""

from __future__ import annotations

import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from code_blocks import blocks
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from tiny_families import save_flux, save_qwen_image, save_wan, save_z_image

import omniq_compile as omniq
from omniq_compile.layer_plan import count_quantized

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("diffusers", minversion="0.40")  # where `dtype` is a keyword
EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 1.0}
# Of the contrast of these models' pictures; int8 and fp8 change them by 3 to 9%.
WORST = 0.15


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile by aot_eager what the examples compile: other tests look at Inductor's code."""
    whole, blocks = torch.compile, omniq.compile

    def compile(model: Any, backend: str = "aot_eager", **given: Any) -> Any:
        if backend == "omniq":
            given["options"] = {**given["options"], "compiler": "aot_eager"}
        return whole(model, backend=backend, **given)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(
        omniq, "compile", lambda model, given: blocks(model, {**given, "compiler": "aot_eager"})
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call an example's ``main`` with a command line, and smaller constants; returns the module."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def call(name: str, *arguments: object, **constants: Any) -> ModuleType:
        module = import_module(name)
        for constant, value in constants.items():
            assert hasattr(module, constant)
            monkeypatch.setattr(module, constant, value)
        command = [name, "--device", "cpu", "--prompt", "a red fox", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        module.main()
        return module

    return call


def in_bf16(folder: Path, *, adapter: str = "", **call: Any) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    if adapter:
        pipe.load_lora_weights(adapter)
    return pipe("a red fox", **call, generator=torch.Generator().manual_seed(0))


def error(picture: Any, expected: Any) -> float:
    """Return how far pictures are from others, of the contrast of these."""
    a, e = (np.asarray(image, dtype=np.float64) for image in (picture, expected))
    assert a.shape == e.shape
    return float(np.linalg.norm(a - e) / np.linalg.norm(e - e.mean()))


def test_the_readme_draws_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_qwen_image(tmp_path / "a/diffusers-folder")
    monkeypatch.chdir(tmp_path)
    shown = blocks(EXAMPLES.parent / "README.md", "python")
    (code,) = (block for block in shown if "import torch" in block)
    space: dict[str, Any] = {}
    exec(code, space)
    call = {name: SMALL[name] for name in SMALL if name != "guidance_scale"}
    picture = space["pipe"]("a red fox", **call, generator=torch.Generator().manual_seed(0)).images
    assert 0.01 < error(picture[0], in_bf16(folder, **call).images[0]) < WORST


def test_z_image(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = save_z_image(tmp_path / "model"), tmp_path / "new" / "out"
    run("z_image", "--model", folder, "--out", out, CALL=SMALL)
    expected = in_bf16(folder, **SMALL).images[0]
    pictures = {name: Image.open(out / f"{name}.png") for name in ("bf16", "int8")}
    assert error(pictures["bf16"], expected) < 0.01
    assert 0.01 < error(pictures["int8"], expected) < WORST
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["bf16", "int8", "PSNR to BF16"]
    # Of pictures with 256 levels; the example has it of those before they are rounded.
    levels = np.asarray(pictures["int8"], float) - np.asarray(pictures["bf16"], float)
    psnr = -10 * np.log10(np.mean((levels / 255) ** 2))
    assert float(printed[2].split()[-2]) == pytest.approx(psnr, abs=0.5)


def test_qwen_image(run: Any, tmp_path: Path) -> None:
    folder, sizes = save_qwen_image(tmp_path / "model"), ((64, 64), (96, 64))
    call = {"num_inference_steps": 2, "negative_prompt": "a fox", "true_cfg_scale": 1.5}
    module = run("qwen_image", "--model", folder, "--out", tmp_path, SIZES=sizes, CALL=call)
    for width, height in sizes:
        expected = in_bf16(folder, width=width, height=height, **call).images[0]
        assert 0.01 < error(Image.open(tmp_path / f"{width}x{height}.png"), expected) < WORST
    pipe = module.load(folder, "int8", "cpu")
    assert (count_quantized(pipe.transformer), count_quantized(pipe.text_encoder)) == (32, 7)


def test_wan_video(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, stored = save_wan(tmp_path / "model"), tmp_path / "stored"
    call = {**SMALL, "height": 32, "width": 32, "num_frames": 5}
    videos: list[Any] = []

    def export(frames: Any, path: str, fps: int) -> None:
        videos.append(frames)

    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(import_module("wan_video"), "export_to_video", export)
    expected = in_bf16(folder, **call).frames[0]
    for _ in range(2):
        module = run("wan_video", "--model", folder, "--stored", stored, CALL=call)
        shutil.rmtree(folder, ignore_errors=True)  # the second reads what the first has stored
    assert np.array_equal(*videos)
    assert 0.01 < error(videos[0], expected) < WORST
    pipe = module.load(folder, stored, "fp8", "cpu")
    assert [count_quantized(getattr(pipe, name)) for name in module.EXPERTS] == [23, 23]


def test_flux_lora(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder, out = save_flux(tmp_path / "model"), tmp_path / "out"
    transformer = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).transformer
    adapters = [write_lora(tmp_path / f"{seed}", transformer, seed) for seed in (1, 2)]
    run("flux_lora", *adapters, adapters[0], "--model", folder, "--out", out, CALL=SMALL)
    pictures = [Image.open(out / f"{number}.png") for number in range(4)]
    assert error(pictures[3], pictures[1]) == 0  # the second adapter left nothing behind
    for adapter, picture in zip(["", *adapters], pictures, strict=False):
        expected = in_bf16(folder, adapter=adapter, **SMALL).images[0]
        assert 0.01 < error(picture, expected) < WORST
        others = [error(picture, other) for other in pictures[:3] if other is not picture]
        assert min(others) > 3 * WORST


def write_lora(folder: Path, transformer: Any, seed: int) -> str:
    """Save a LoRA of random numbers for each block; returns the folder."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in transformer.named_modules():
        if name.endswith(("attn.to_q", "ff.net.2")):
            N, K = layer.weight.shape
            for part, shape in {"lora_A": (4, K), "lora_B": (N, 4)}.items():
                value = torch.randn(shape, generator=generator) * 0.3
                state[f"transformer.{name}.{part}.weight"] = value.to(torch.bfloat16)
    folder.mkdir()
    save_file(state, folder / "pytorch_lora_weights.safetensors")
    return str(folder)


@pytest.mark.parametrize(("ignored", "rewritten"), [(["modulation"], 12), ([], 15)])
def test_own_model(
    ignored: list[str],
    rewritten: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["own_model", "--ignored-layers", *ignored])
    import_module("own_model").main()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("int8 on cpu:")
    assert f": {rewritten} of 17 products rewritten; " in first
    assert 0.002 < float(last.split()[-1]) < 0.03
