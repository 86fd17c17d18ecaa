"""Linear layers that no graph holds are named, by their parameters; all others are not."""

from __future__ import annotations

import gc
import io
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrizations

import omniq_compile as omniq
from omniq_compile.inspector.inspection import inspect
from omniq_compile.inspector.page import render_page
from omniq_compile.inspector.text import render

WIDTH = 38
X = torch.randn(7, WIDTH)


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Experts(nn.Module):
    """Writes by index in a loop with a graph break, which Dynamo leaves to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(linear() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for expert in self.experts:
            torch._dynamo.graph_break()
            x = expert(x)
        return x


class Net(nn.Module):
    def __init__(self, second: nn.Module, third: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = linear(), second
        self.third = third or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.third(self.second(x))


def untraced(model: nn.Module, **options: Any) -> list[str]:
    return omniq.explain(model, [X], OPTIONS | options).untraced


def test_layers_that_dynamo_leaves_to_python_are_named_and_nothing_else() -> None:
    model = Net(Experts(), linear())
    assert untraced(model) == ["second.experts.0", "second.experts.1"]
    assert untraced(Net(linear())) == []


def test_layers_that_are_not_called_are_named() -> None:
    model = Net(linear())
    model.unused = nn.Sequential(linear(), nn.GELU(), linear())
    assert untraced(model) == ["unused.0", "unused.2"]


@pytest.mark.parametrize("options", [{"ignored_layers": ["re:.*"]}, {"min_features": 1000}])
def test_layers_that_are_kept_are_in_a_graph(options: dict[str, Any]) -> None:
    model = Net(linear())
    model.unused = linear()
    assert untraced(model, **options) == ["unused"]


def test_a_weight_that_two_layers_hold_is_found_once_for_both() -> None:
    model = Net(linear())
    model.tied, model.other = linear(), linear()
    model.tied.weight = model.first.weight
    assert untraced(model) == ["other"]


def test_a_layer_of_the_same_name_in_another_module_is_not_taken_for_it() -> None:
    """Dynamo names what is in a frame of its own as if that were the model."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(x).relu()

    model = Net(Experts(), Own())
    model.other = linear()
    names = untraced(model)
    assert names == ["second.experts.0", "second.experts.1", "other"]


class Own(nn.Linear):
    """Multiplies by a function of its weight, and of its input."""

    how: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.how(self.weight, x))


def computed(how: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> nn.Module:
    layer = Own(WIDTH, WIDTH)
    layer.how = how
    return layer


def replaced() -> nn.Module:
    layer = Own(WIDTH, WIDTH, bias=False)
    layer.how, weight = (lambda w, x: w), layer.weight.detach()
    del layer.weight
    layer.weight = weight  # type: ignore[assignment]
    return layer


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, self.linear, torch.sin, (x,))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "moved": lambda: computed(lambda w, x: w.T.contiguous()),
    "of_an_activation": lambda: computed(lambda w, x: w * x.sum()),
    "no_parameter": replaced,
    "parametrized": lambda: parametrizations.weight_norm(linear()),
    "stored": lambda: nn.Sequential(linear()),
    "branch": Branch,
    "attention": lambda: nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True),
    "sparse": lambda: computed(lambda w, x: w @ w.detach().clone()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_in_a_graph_however_its_weight_comes(name: str) -> None:
    model = Net(LAYERS[name]()).eval().requires_grad_(False)
    if name == "stored":
        omniq.quantize_(model, OPTIONS)
    inputs = [X[None]] if name == "attention" else [X]
    assert omniq.explain(model, inputs, OPTIONS).untraced == []


def test_parameters_that_are_attributes_of_the_graph_are_told_too() -> None:
    model = Net(linear()).requires_grad_(False)
    model.unused = linear()
    with torch._inductor.config.patch(freezing=True):
        assert untraced(model) == ["unused"]


def test_a_weight_that_only_an_embedding_reads_is_in_no_product() -> None:
    class Tied(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(F.embedding(torch.arange(5), self.head.weight))

    model = Tied(linear())
    model.head = linear()
    assert untraced(model) == ["head"]


def test_a_compiled_model_is_named_as_it_was() -> None:
    model = Net(torch.compile(nn.Sequential(linear())))  # type: ignore[arg-type]
    model.unused = torch.compile(linear())
    assert untraced(torch.compile(model)) == ["unused"]  # type: ignore[arg-type]


def test_weights_that_hooks_bring_for_a_call_are_told() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Net(linear(), linear()).requires_grad_(False)
    model.unused = linear()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert untraced(model) == ["unused"]


def test_one_graph_that_dynamo_runs_for_several_modules_is_of_them_all() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).relu()

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks[:3]:
                torch._dynamo.graph_break()
                x = block(x)
            return x

    report = omniq.explain(Loop().requires_grad_(False), [X], OPTIONS)
    assert len(report.graphs) == 1
    assert report.untraced == ["blocks.3.linear"]


def test_no_weight_is_kept_alive() -> None:
    model = Net(Experts(), linear())
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    report = omniq.explain(model, [X], OPTIONS)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert report.untraced
    assert not any(weight() is not None for weight in weights)


def test_every_form_of_a_report_shows_it() -> None:
    model = Net(linear())
    model.unused = nn.ModuleList(linear() for _ in range(7))
    report = omniq.explain(model, [X], OPTIONS)
    line = (
        "in no graph 7: unused.0, unused.1, unused.2, unused.3, unused.4 and 2 more: not called "
        "in this call, or run by Python outside the graphs"
    )
    assert json.loads(report.to_json())["untraced"] == [f"unused.{n}" for n in range(7)]
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    assert line in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert line in report._repr_html_()
    inspection = inspect("Net", model, [X], OPTIONS)
    assert f"# {line}" in render(inspection, ["traced"]).splitlines()
    assert line in render_page(inspection)

    del model.unused
    for text in (omniq.explain(model, [X], OPTIONS)._repr_html_(),
                 render(inspect("Net", model, [X], OPTIONS), ["traced"]),
                 render_page(inspect("Net", model, [X], OPTIONS))):  # fmt: skip
        assert "in no graph" not in text
