"""What the graph tests share: a fresh Dynamo for each, and short helpers."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from outcomes import Outcomes
from torch import fx, nn

from omniq_compile import QuantConfig, Site, explain
from omniq_compile.backend import omniq
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.target import detect
from omniq_compile.passes import pipeline
from omniq_compile.passes import sites as passes
from omniq_compile.passes.context import Context

# From 9.2 on pytest gives a handler to each logger that does not propagate, and where PyTorch's
# structured trace has one, every graph that is compiled is printed.
logging.getLogger("torch.__trace").propagate = True

# The graph alone, and every size: what these tests are about.
OPTIONS = {"method": "int8", "min_features": 1, "compiler": "eager"}


# Imports and Dynamo's traces make hundreds of thousands of objects that live on: with Python's own
# threshold of 700, up to a twelfth of the time goes to asking again whether they are garbage.
gc.set_threshold(50_000, 20, 20)


# For a log's sake Dynamo flushes the CPU's caches and times the guards of each frame it compiles:
# 25 ms, half of what a small graph takes.
if hasattr(torch._dynamo.guards, "profile_guard_manager"):
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Keep what was imported out of garbage collections: looking through it takes each of those
    that `compare` and `tune` ask for half a second, and Dynamo's graphs lead to many more.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    # No option: where pytest is given no folder, workers of pytest-xdist do not know one of this
    # file's.
    file = os.environ.get("OUTCOMES")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(file)))


# A minute and more each. Workers take whole files, and one that took such a file among the last
# would be alone with it.
LONG = ("test_triton_compiled.py", "test_tune.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what says most in little time, on a machine with a GPU; then what takes long."""
    items.sort(
        key=lambda item: (item.get_closest_marker("gpu_smoke") is None, item.path.name not in LONG)
    )


class Holder(nn.Module):
    """Calls a function with its inputs and its tensors: parameters, unless they are buffers."""

    def __init__(self, function: Callable[..., Any], buffers: bool = False, **tensors: Any) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            if buffers:
                self.register_buffer(name, tensor)
            else:
                setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.names = tuple(tensors)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *(getattr(self, name) for name in self.names))


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="omniq", options=OPTIONS | options)


def sites(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> list[Site]:
    return explain(model, inputs, OPTIONS | options).sites


def run(model: nn.Module, *inputs: Any, **options: Any) -> tuple[Any, list[passes.Site]]:
    """Call a model compiled by omniq; returns its result and its sites, from one trace."""
    config = QuantConfig.from_options(OPTIONS | options)
    found: list[passes.Site] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        context = Context(config, detect("cpu"))
        pipeline.run(gm, context)
        found.extend(context.sites)
        return omniq(gm, example_inputs, options=config)

    return torch.compile(model, backend=backend)(*inputs), found


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    actual, expected = (torch.view_as_real(t) if t.is_complex() else t for t in (actual, expected))
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def dequantized(x: torch.Tensor, *axes: int) -> torch.Tensor:
    """The published int8 formula in numpy: round(x / (amax / 127)) * (amax / 127) over ``axes``."""
    real = x.detach().float().numpy()
    scale = numpy.abs(real).max(axis=axes or -1, keepdims=True) / numpy.float32(127)
    codes = numpy.rint(real / numpy.where(scale == 0, numpy.float32(1), scale))
    return torch.from_numpy(codes.astype(numpy.float64) * scale.astype(numpy.float64))


def traced(model: Any, *args: Any, **kwargs: Any) -> list[tuple[fx.GraphModule, list[Any]]]:
    """Return each graph that Dynamo makes of a call, with the inputs it was called with."""
    graphs = []

    def record(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append((gm, list(inputs)))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=record)(*args, **kwargs)
    return graphs


def count(gm: fx.GraphModule, target: Any) -> int:
    return sum(node.target is target for node in gm.graph.nodes)


def quantized_inputs(
    original: fx.GraphModule, inputs: list[Any], context: Context, *, lowered: bool
) -> dict[str, Any]:
    """Return what each placeholder of a quantized or lowered graph stands for, by name."""
    names = [n.name for n in original.graph.nodes if n.op == "placeholder"]
    values = dict(zip(names, inputs, strict=True))
    for binding in context.bindings:
        weight = binding.expression.module(*(values[str(leaf)] for leaf in binding.leaves))
        parts = get_format(binding.format).quantize(weight)
        parts = binding.arrange(parts) if lowered else parts
        values |= zip(binding.parts, parts, strict=True)
    return values


def stage_inputs(
    gm: fx.GraphModule, original: fx.GraphModule, inputs: list[Any], context: Context
) -> list[Any]:
    """Give a rewritten graph the original's inputs, and weights by the published formula."""
    names = [n.name for n in original.graph.nodes if n.op == "placeholder"]
    values = dict(zip(names, inputs, strict=True))
    for binding in context.bindings:
        weight = binding.expression.module(*(values[str(leaf)] for leaf in binding.leaves))
        real = weight.detach().float().numpy()
        scale = numpy.abs(real).max(axis=-1) / numpy.float32(127)
        codes = numpy.rint(real / numpy.where(scale == 0, numpy.float32(1), scale)[..., None])
        values[binding.parts[0]] = torch.from_numpy(codes.astype(numpy.int8))
        values[binding.parts[1]] = torch.from_numpy(scale)
    return [values[n.name] for n in gm.graph.nodes if n.op == "placeholder"]
