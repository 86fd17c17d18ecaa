"""What is checked on a device, written for any device: the CPU runs the same functions in small.

Every function raises AssertionError where something is wrong. `Place` says where it runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import omniq_compile
from omniq_compile.compiling import weight_changes
from omniq_compile.models.families import FAMILIES
from omniq_compile.models.random_models import make_inputs, random_model

# Options, and the worst error of a tiny model's output beside the same model in BF16: 1.5 times
# what the four families had on a CPU. Outputs that have nothing to do with each other have 1.4.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "int8": ({"method": "int8"}, 0.06),
    "fp8": ({"method": "fp8"}, 0.16),
    "fp8 block-wise": ({"method": "fp8", "weight_block_size": [128, 128]}, 0.16),
    "mxfp8": ({"method": "mxfp8"}, 0.20),
    "mxfp4": ({"method": "mxfp4"}, 0.65),
    "mxfp4 W4A8": ({"method": "mxfp4", "w4a8_fallback_layers": ["re:.*"]}, 0.60),
    "mxfp4_dualscale": ({"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0}, 0.65),
}
FAMILY_NAMES = sorted(FAMILIES)


@dataclass(frozen=True)
class Place:
    """A ``torch.device``, what compiles there, and the width and tokens of the models."""

    device: str
    compiler: str = "inductor"
    width: int = 192
    tokens: tuple[int, int] = (64, 16)

    def options(self, method: str, **more: Any) -> dict[str, Any]:
        return {"min_features": 1, "compiler": self.compiler} | METHODS[method][0] | more

    def put(self, value: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda t: t.to(self.device), value)


def picture(output: Any) -> torch.Tensor:
    """Return a model's picture, apart from memory that a CUDA graph may write again."""
    first = output[0] if isinstance(output, tuple) else output.sample
    return (first[0] if isinstance(first, list) else first).float().clone()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def assert_near(
    actual: torch.Tensor, expected: torch.Tensor, method: str, least: float = 0
) -> None:
    assert actual.shape == expected.shape
    found = relative(actual, expected)
    assert least < found < METHODS[method][1], f"error {found:.4f}"


def tiny(family: str, place: Place, num_blocks: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    model = random_model(family, "tiny", width=place.width, num_blocks=num_blocks)
    model = model.to(place.device)
    return model, inputs_for(model, *place.tokens, place)


def inputs_for(model: nn.Module, image: int, text: int, place: Place, seed: int = 0) -> Any:
    return place.put(make_inputs(model, image_tokens=image, text_tokens=text, seed=seed))


def whole(family: str, method: str, place: Place, **more: Any) -> None:
    """A model compiled whole, called with new values, and then at other resolutions."""
    model, inputs = tiny(family, place)
    fast = torch.compile(model, backend="omniq", options=place.options(method, **more))
    other = inputs_for(model, *place.tokens, place, seed=3)
    with torch.inference_mode():
        first, second = picture(model(**inputs)), picture(model(**other))
        # Compiled, recorded and replayed, where CUDA graphs are on.
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            assert_near(picture(fast(**inputs)), first, method)
        torch.compiler.cudagraph_mark_step_begin()
        assert_near(picture(fast(**other)), second, method)
    assert relative(first, second) > 0.1


def regional(family: str, method: str, place: Place, **more: Any) -> None:
    """Repeated blocks through diffusers' own method, and through `omniq_compile.compile`."""
    for compile_blocks in (_diffusers_blocks, omniq_compile.compile):
        model, inputs = tiny(family, place, num_blocks=2)
        with torch.inference_mode():
            expected = picture(model(**inputs))
            compile_blocks(model, place.options(method, **more))
            for _ in range(3):
                # Otherwise each block would count as a step, and free what the one before returned.
                torch.compiler.cudagraph_mark_step_begin()
                assert_near(picture(model(**inputs)), expected, method)


def _diffusers_blocks(model: Any, options: dict[str, Any]) -> None:
    model.compile_repeated_blocks(backend="omniq", options=options)


def resolutions(family: str, method: str, place: Place) -> None:
    """Other numbers of image and text tokens, one of them below 17 and odd."""
    model, inputs = tiny(family, place)
    fast = torch.compile(model, backend="omniq", options=place.options(method))
    with torch.inference_mode():
        assert_near(picture(fast(**inputs)), picture(model(**inputs)), method)
        for image, text in [(36, 24), (100, 9), place.tokens]:
            other = inputs_for(model, image, text, place)
            assert_near(picture(fast(**other)), picture(model(**other)), method)


# K and N: aligned as GEMMs want them, odd, and each bad on its own.
LAYERS = [(256, 384), (264, 136), (257, 131), (256, 131), (257, 384)]
ROWS = (1, 2, 16, 17, 33, 130)


# Numbers of rows, and sequences of them: some GEMMs take no fewer than 17.
SEQUENCES = [*((M,) for M in ROWS), (2, 1), (2, 9), (3, 40)]


def rows(
    method: str, K: int, N: int, dynamic: bool | None, place: Place, shapes: Any = SEQUENCES
) -> None:
    """One layer at several numbers of tokens, compiled for each or for all of them."""
    layer = nn.Linear(K, N, dtype=torch.bfloat16).requires_grad_(False).to(place.device)
    fast = torch.compile(
        nn.Sequential(layer), backend="omniq", options=place.options(method), dynamic=dynamic
    )
    exact = nn.Linear(K, N).to(place.device)
    exact.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for shape in shapes:
            x = torch.randn(*shape, K, device=place.device, dtype=torch.bfloat16)
            # A layer that was left in BF16 has an error of 0.002.
            assert_near(fast(x).float(), exact(x.float()), method, least=0.004)


def channels(method: str, place: Place, side: int = 64) -> None:
    """A layer of one picture's channels, whose rows are columns in memory."""
    layer = nn.Linear(256, 384, dtype=torch.bfloat16).requires_grad_(False).to(place.device)
    model = nn.Sequential(layer)
    fast = torch.compile(model, backend="omniq", options=place.options(method))
    x = torch.randn(1, 256, side, side, device=place.device, dtype=torch.bfloat16)
    x = x.flatten(2).transpose(1, 2)
    with torch.no_grad():
        assert_near(fast(x).float(), model(x).float(), method, least=0.004)


def stored(family: str, method: str, place: Place, folder: Path) -> None:
    """Weights quantized on the device, and while loading to it, are the same and compile."""
    model, inputs = tiny(family, place)
    options = place.options(method)
    model.save_pretrained(folder)
    with torch.inference_mode():
        expected = picture(model(**inputs))
    omniq_compile.quantize_(model, options)
    loaded = omniq_compile.load_model(folder, options=options, device=place.device)
    with torch.inference_mode():
        eager = picture(model(**inputs))
        assert torch.equal(picture(loaded(**inputs)), eager)
        assert_near(eager, expected, method)
        for subject in (model, loaded):
            assert {p.device.type for p in subject.parameters()} == {place.device}
            fast = torch.compile(subject, backend="omniq", options=options)
            assert_near(picture(fast(**inputs)), expected, method)


def changed_weights(place: Place, **more: Any) -> None:
    """A change through ``.data`` after a pause is in the very next call; any other always is."""
    model, inputs = tiny("QwenImageTransformer2DModel", place)
    fast = torch.compile(model, backend="omniq", options=place.options("int8", **more))
    layer: Any = model.get_submodule("transformer_blocks.0.img_mlp.net.2")
    N, K = layer.weight.shape
    down, up = (torch.randn(s, device=place.device).bfloat16() for s in ((4, K), (N, 4)))
    with torch.no_grad():
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            before = picture(fast(**inputs))
        layer.weight.data += up @ down
        time.sleep(2 * weight_changes.PAUSE_SECONDS)
        expected = picture(model(**inputs))
        time.sleep(2 * weight_changes.PAUSE_SECONDS)
        fused = picture(fast(**inputs))
        assert relative(before, expected) > 0.1
        assert_near(fused, expected, "int8")
        fast(**inputs)
        layer.weight.mul_(-1)
        assert_near(picture(fast(**inputs)), picture(model(**inputs)), "int8")


def steady_calls(place: Place) -> tuple[nn.Module, Any]:
    """Return what is called again and again, and a call of it whose weights are found settled."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    model = model.requires_grad_(False).to(place.device, torch.bfloat16)
    fast = torch.compile(model, backend="omniq", options=place.options("int8"))
    x = torch.randn(64, 256, device=place.device, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(5):
            fast(x)
    return model, lambda: fast(x)
