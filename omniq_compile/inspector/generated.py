"""The code that Inductor generates for a graph: the one place that knows how to ask for it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from omniq_compile.compiling import inductor
from omniq_compile.inspector import absent_gpu
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
    if _devices(_inputs(gm)) <= {target.torch_device}:
        return None
    settings = inductor.settings_of(config)
    tuned = any(value for name, value in settings.items() if name.startswith("max_autotune"))
    if tuned:
        reason: str | None = "max_autotune times kernels on the device, and it is not here"
    else:
        reason = absent_gpu.why_not(target)
    return reason and f"{reason}. The lowered program is what Inductor would compile for {target}"


def generate(
    gm: fx.GraphModule, settings: Mapping[str, Any], target: Target
) -> list[GeneratedCode]:
    """Return the pieces of what `program` returns."""
    return pieces(program(gm, settings, target))


def program(gm: fx.GraphModule, settings: Mapping[str, Any], target: Target) -> str:
    """Let Inductor generate the code of a graph, without compiling or running it.

    Args:
        gm: its placeholders hold their values, fake tensors, as ``example_value``.
        settings: passed on to Inductor.
        target: what the code is for; see `why_not`.

    Returns:
        one Python file; "" for a graph without operations.
    """
    inputs = _inputs(gm)
    if _devices(inputs) <= {target.torch_device}:
        return _program(gm, inputs, settings)
    with absent_gpu.present(target):
        return _program(*absent_gpu.moved(gm, inputs), settings)


def _program(gm: fx.GraphModule, inputs: list[Any], settings: Mapping[str, Any]) -> str:
    # Private to PyTorch, checked on torch 2.11 to 2.15: it replaces the step that hands the code
    # to the C++ compiler. What comes of that is no compiled graph: it must not stay in a cache, and
    # launches of it cannot be captured.
    from torch._inductor.utils import get_code

    unwanted = ("fx_graph_cache", "fx_graph_remote_cache", "triton.cudagraphs")

    def compile() -> Any:
        return inductor.compile(gm, inputs, {**settings, **dict.fromkeys(unwanted, False)})

    uncached = torch._functorch.config.patch(
        enable_autograd_cache=False, enable_remote_autograd_cache=False
    )
    with torch.no_grad(), uncached, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        texts = get_code(compile)
    return str(texts[0]) if texts else ""


def failure(error: Exception) -> str:
    """Word what Inductor raised in place of code, without PyTorch's advice to its developers."""
    advice = ("Set TORCHDYNAMO_VERBOSE", "Use tlparse")
    said = [part for part in str(error).split("\n\n") if not part.startswith(advice)]
    # PyTorch's words from 2.13 on, and those of before.
    if any(words in str(error) for words in ("on the same device", "two different devices")):
        said.append("A tensor that the model makes on no device of its inputs is on the CPU: give "
                    "it their device, as in torch.zeros(3, device=x.device).")  # fmt: skip
    text = "\n".join(part.strip("\n") for part in said)
    return f"Inductor failed with {type(error).__name__}: {text}"


def pieces(text: str) -> list[GeneratedCode]:
    """Cut a generated program into its kernels and the code that calls them.

    A program in a form that is not known is returned whole.
    """
    if not text:
        return []
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


def _devices(inputs: list[Any]) -> set[str]:
    return {value.device.type for value in inputs if isinstance(value, torch.Tensor)}
