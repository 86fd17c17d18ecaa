"""A graph as a short, runnable Python program, with layer names, shapes and dtypes."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from omniq_compile.passes import dynamo
from omniq_compile.passes.sites import Site

_DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
    torch.complex64: "c64",
}
# How FX ends a line: it frees each variable after its last use.
_FREE = re.compile(r";  (\w+ = )+None$")


def program(gm: fx.GraphModule, title: str = "") -> str:
    """Print the graph as Python source.

    The text defines ``forward(...)`` with the graph's inputs as arguments, in order; running it
    needs nothing but ``import torch``, this package's operators, and, for graphs with attributes,
    ``self``.
    """
    graph, nodes = _readable_copy(gm.graph)
    code = graph.python_code("self")
    body = _body(code.src)
    lines = [f"# {title}"] if title else []
    lines += ["import torch", *_imports(code.globals, "\n".join(body)), "", "", "def forward("]
    if any(n.op in ("get_attr", "call_module") for n in graph.nodes):
        lines.append("    self,")
    for name, node in nodes.items():
        if node.op == "placeholder":
            lines.append(f"    {name},{_comment(describe(dynamo.value(node)))}")
    lines.append("):")
    layer = None
    for line in body:
        made = nodes.get(line.partition(" = ")[0].strip())
        if made is None or made.op == "placeholder":
            lines.append(f"    {line}")
            continue
        if dynamo.layer_name(made) != layer:
            layer = dynamo.layer_name(made)
            lines.append(f"    # {layer or '(the model itself)'}")
        lines.append(f"    {line}{_comment(_about(made))}")
    return "\n".join(lines) + "\n"


def describe(value: Any) -> str:
    """Word a value's dtype and shape, such as ``bf16[1, 1024, 3072]``."""
    if isinstance(value, torch.Tensor):
        shape = ", ".join(str(size) for size in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{shape}]"
    if isinstance(value, (list, tuple)):
        return ", ".join(describe(v) for v in value)
    return type(value).__name__ if value is not None else ""


def _about(node: fx.Node) -> str:
    text = describe(dynamo.value(node))
    site: Site | None = node.meta.get("omniq_site")
    if site is None or not ("omniq_added" not in node.meta or "omniq_name" in node.meta):
        return text
    decision = site.decision
    if decision.kernel is None:
        return f"{text}  kept: {decision.reason}"
    return f"{text}  {decision.method}: {decision.kernel.name}"


def _comment(text: str) -> str:
    return f"  # {text}" if text else ""


def _readable_copy(graph: fx.Graph) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """Copy a graph with readable names; returns the originals by those names."""
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    originals: dict[str, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        new = copy.create_node(node.op, node.target, args, kwargs, _name(node))
        if node.op == "placeholder":
            new.target = new.name
        copies[node] = new
        originals[new.name] = node
    return copy, originals


def _name(node: fx.Node) -> str:
    if "omniq_name" in node.meta:
        return str(node.meta["omniq_name"])
    if "omniq_weight" in node.meta:
        return _identifier(node.meta["omniq_weight"])
    if dynamo.is_weight(node):
        return _identifier(dynamo.weight_name(node))
    if node.op == "placeholder":
        return node.name.removeprefix("l_").removeprefix("kwargs_").removesuffix("_") or node.name
    return re.sub(r"_default(_\d+)?$", r"\1", node.name)


def _identifier(text: str) -> str:
    return re.sub(r"\W", "_", text)


def _body(source: str) -> list[str]:
    body = source.split("\n")
    start = next(i for i, line in enumerate(body) if line.startswith("def forward("))
    lines = (_FREE.sub("", line.strip()) for line in body[start + 1 :])
    return [line for line in lines if line]


def _imports(names: dict[str, Any], body: str) -> list[str]:
    """Import what the code names beside torch, such as ``from torch import device``."""
    lines = []
    for name, thing in sorted(names.items()):
        if name == "torch" or not re.search(rf"\b{name}\b", body):
            continue
        if isinstance(thing, type(re)):
            lines.append(f"import {thing.__name__} as {name}")
        elif isinstance(thing, float):
            lines.append(f"from math import {name}")
        elif getattr(thing, "__module__", None):
            lines.append(f"from {thing.__module__} import {thing.__qualname__} as {name}")
    return lines
