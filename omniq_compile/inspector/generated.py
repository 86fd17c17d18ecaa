"""The code that Inductor generates for a graph: the one place that knows how to ask for it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from omniq_compile.lowering.target import Target
from omniq_compile.passes import dynamo
from omniq_compile.passes.config import QuantConfig

_KERNEL = re.compile(r"^(\w+) = async_compile\.(\w+)\(.*?'''\n?(.*?)'''.*?\)\n", re.M | re.S)
_CALLS = re.compile(r"^ {8}args\.clear\(\)\n.*?^ {8}return .*?\n", re.M | re.S)
_LANGUAGES = {"cpp": "C++", "cpp_pybinding": "C++", "triton": "Triton"}

# By suffix, of omniq's own device code.
LANGUAGES = {".cpp": "C++", ".py": "Triton"}


@dataclass(frozen=True)
class GeneratedCode:
    """One piece of a compiled program.

    Attributes:
        name: of the kernel; "call" for the code that calls the kernels, in order; the file of one
            of omniq's own kernels.
        language: ``C++``, ``Triton`` or ``Python``.
        source: as generated, or as it lies in the file.
    """

    name: str
    language: str
    source: str


def why_not(config: QuantConfig, target: Target, gm: fx.GraphModule) -> str | None:
    """Return why no code can be generated for a lowered graph on this machine, or None."""
    if config.compiler != "inductor":
        return f"option 'compiler' is {config.compiler!r}, which generates none"
    devices = {v.device.type for v in _inputs(gm) if isinstance(v, torch.Tensor)}
    if devices <= {target.torch_device}:
        return None
    return (
        f"Inductor generates code for the device that a model is on, and this one is on "
        f"{' and '.join(sorted(devices))}, not on {target.torch_device}: the lowered program is "
        f"what it would compile for {target}"
    )


def generate(gm: fx.GraphModule, settings: Mapping[str, Any]) -> list[GeneratedCode]:
    """Let Inductor generate the code of a graph, without compiling or running it.

    Args:
        gm: its placeholders hold their values, fake tensors, as ``example_value``.
        settings: passed on to Inductor.
    """
    # Private to PyTorch; checked on torch 2.13, where it replaces the step that hands the code to
    # the C++ compiler. What comes of that is no compiled graph, and must not stay in a cache.
    from torch._inductor.utils import get_code

    def compile() -> Any:
        options = {**settings, "fx_graph_cache": False, "fx_graph_remote_cache": False}
        return torch._inductor.compile(gm, _inputs(gm), options=options)

    uncached = torch._functorch.config.patch(
        enable_autograd_cache=False, enable_remote_autograd_cache=False
    )
    with torch.no_grad(), uncached, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        texts = get_code(compile)
    return pieces(texts[0]) if texts else []


def pieces(text: str) -> list[GeneratedCode]:
    """Cut a generated program into its kernels and the code that calls them.

    A program in a form that is not known is returned whole.
    """
    kernels = [
        GeneratedCode(name, _LANGUAGES.get(kind, kind), source.strip("\n"))
        for name, kind, source in _KERNEL.findall(text)
    ]
    calls = _CALLS.search(text)
    if calls is None:
        return [GeneratedCode("program", "Python", text)]
    source = "\n".join(line.removeprefix(" " * 8) for line in calls[0].splitlines())
    return [*kernels, GeneratedCode("call", "Python", source)]


def _inputs(gm: fx.GraphModule) -> list[Any]:
    return [dynamo.value(node) for node in gm.graph.nodes if node.op == "placeholder"]
