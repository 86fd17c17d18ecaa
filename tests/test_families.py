"""The four model families: whole, by repeated blocks, with graph breaks, at changing sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import TinyModel, tiny_model

from omniq_compile import explain
from omniq_compile.models.families import FAMILIES
from omniq_compile.models.random_models import make_inputs, random_model

# Linears of each tiny preset, counted on the modules, and those among them that Wan keeps in
# float32 or that the forward does not reach.
KEPT_IN_FLOAT32 = {"WanTransformer3DModel": 2}
FAMILY_NAMES = sorted(FAMILIES)
QWEN = "QwenImageTransformer2DModel"


def options(**more: Any) -> dict[str, Any]:
    return {"method": "int8", "min_features": 1, "compiler": "aot_eager", **more}


def sample(output: Any) -> torch.Tensor:
    """Return a model's picture; Z-Image returns a list of them."""
    first = output[0] if isinstance(output, tuple) else output.sample
    return first[0] if isinstance(first, list) else first


def error(actual: Any, expected: Any) -> float:
    a, e = sample(actual).float(), sample(expected).float()
    return ((a - e).norm() / e.norm()).item()


def single_blocks(name: str) -> TinyModel:
    """A model of one block of each kind: those after it are traced for nothing new, and as long."""
    model = random_model(name, "tiny", num_blocks=1)
    return TinyModel(model, make_inputs(model, image_tokens=64, text_tokens=16))


# How tensors are marked is the same in every family: the others are left to `make zoo`.
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, torch.inference_mode) for name in FAMILY_NAMES),
        (QWEN, torch.no_grad),
        *(
            pytest.param(name, torch.no_grad, marks=pytest.mark.zoo)
            for name in FAMILY_NAMES
            if name != QWEN
        ),
    ],
)
def test_a_whole_model_stays_near_bf16(name: str, mode: Any) -> None:
    loaded = single_blocks(name)
    fast = torch.compile(loaded.model, backend="omniq", options=options())
    with mode():
        expected = loaded.run()
        actual = fast(**loaded.inputs)
    assert sample(actual).dtype is sample(expected).dtype
    assert 0 < error(actual, expected) < 0.05


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_linear_is_a_site(name: str) -> None:
    """The linears that run are counted by hooks, independently of the graph."""
    loaded = tiny_model(name)
    called: list[str] = []
    for layer, module in loaded.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, layer=layer: called.append(layer))
    with torch.no_grad():
        loaded.run()
    fresh = tiny_model(name)
    report = explain(fresh.model, fresh.inputs, options(), stages=())
    assert [s.layer for s in report.sites] == called
    assert len(report.kept) == KEPT_IN_FLOAT32.get(name, 0)
    assert all("float32" in s.decision.reason for s in report.kept)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_repeated_blocks_compile_once_and_stay_near_bf16(name: str) -> None:
    loaded = tiny_model(name)
    with torch.no_grad():
        expected = loaded.run()
        graphs = torch._dynamo.utils.counters["stats"]
        start = graphs["unique_graphs"]
        loaded.model.compile_repeated_blocks(backend="omniq", options=options())
        actual = loaded.run()
    assert 0 < error(actual, expected) < 0.05
    repeated = sum(
        type(m).__name__ in loaded.model._repeated_blocks for m in loaded.model.modules()
    )
    assert repeated > graphs["unique_graphs"] - start >= 1


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_new_resolution_gets_its_own_answer(name: str) -> None:
    loaded, graphs = single_blocks(name), torch._dynamo.utils.counters["stats"]
    start = graphs["unique_graphs"]
    # AOTAutograd, which takes most of the time, sees the same operators in every family.
    given = options(compiler="aot_eager" if name == QWEN else "eager")
    fast = torch.compile(loaded.model, backend="omniq", options=given)
    with torch.no_grad():
        for image, text in [(64, 16), (36, 24), (100, 9), (64, 16)]:
            inputs = make_inputs(loaded.model, image_tokens=image, text_tokens=text)
            expected = loaded.model(**inputs)
            actual = fast(**inputs)
            assert sample(actual).shape == sample(expected).shape
            assert 0 < error(actual, expected) < 0.05
    # One for the first size, and one for any.
    assert graphs["unique_graphs"] - start == 2


class Broken(torch.nn.Module):
    """Two blocks with a graph break between them and one inside the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(40, 72), torch.nn.Linear(72, 56)
        self.third = torch.nn.Linear(56, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        x = self.second(x)
        torch._dynamo.graph_break()
        return self.third(x).relu()


def test_graph_breaks_leave_every_part_rewritten() -> None:
    model, x = Broken(), torch.randn(3, 5, 40)
    with torch.no_grad():
        report = explain(model, (x,), options())
        assert [s.layer for s in report.rewritten] == ["first", "second", "third"]
        assert len(report.graphs) == 3
        actual = torch.compile(model, backend="omniq", options=options())(x)
        expected = model(x)
    assert 0 < ((actual - expected).norm() / expected.norm()) < 0.03


def test_one_family_through_inductor_whole_and_by_blocks() -> None:
    """The C++ compile, of one block, of what aot_eager checks above."""
    model, plain = (
        random_model("ZImageTransformer2DModel", "tiny", num_blocks=1) for _ in range(2)
    )
    chosen = options(compiler="inductor")
    with torch.inference_mode():
        inputs = make_inputs(model, image_tokens=64, text_tokens=16)
        others = make_inputs(model, image_tokens=36, text_tokens=24)
        expected = plain(**inputs)
        fast = torch.compile(model, backend="omniq", options=chosen)
        assert 0 < error(fast(**inputs), expected) < 0.05
        # A block for one size is part of the whole: it is compiled for all, once. Of a first call
        # with 16 text tokens Dynamo would take their number for fixed.
        model.compile_repeated_blocks(backend="omniq", options=chosen, dynamic=True)
        assert 0 < error(model(**others), plain(**others)) < 0.05
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert 0 < error(model(**inputs), expected) < 0.05
