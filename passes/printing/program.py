"""A graph as a short, runnable Python program, with layer names, shapes and dtypes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from omniq_compile.passes import dynamo
from omniq_compile.passes.printing.node_words import (
    about,
    describe,
    readable_name,
    relative,
    weight_of,
)

# How FX ends a line: it frees each variable after its last use.
_FREE = re.compile(r";  (\w+ = )+None$")

# Under this key a node's metadata may hold a function from the names of all nodes to the lines
# that stand for the node, for what FX has no words for, such as a loop.
LINES = "omniq_lines"


@dataclass(frozen=True)
class Function:
    """A graph as one Python function.

    Attributes:
        text: its lines, from ``def`` to ``return``.
        imports: the import statements it needs beside ``import torch``.
        lines: the line that makes each node, by the node of the graph that was printed.
        gm: that graph.
        names: of its nodes in the text.
    """

    text: list[str]
    imports: list[str]
    lines: dict[fx.Node, str]
    gm: fx.GraphModule
    names: dict[fx.Node, str]


def program(gm: fx.GraphModule, title: str = "") -> str:
    """Print the graph as Python source.

    The text defines ``forward(...)`` with the graph's inputs as arguments, in order; running it
    needs nothing but ``import torch``, this package's operators, and, for graphs with attributes,
    ``self``. Only NumPy's functions have to be put in by hand.
    """
    return module_text([function(gm)], title)


def module_text(functions: list[Function], title: str = "") -> str:
    """Print functions as one Python file."""
    imports = sorted({line for function in functions for line in function.imports})
    lines = [f"# {title}"] if title else []
    lines += ["import torch", *imports]
    for function in functions:
        lines += ["", "", *function.text]
    return "\n".join(lines) + "\n"


def function(
    gm: fx.GraphModule,
    name: str = "forward",
    *,
    names: Mapping[fx.Node, str] | None = None,
    inside: str = "",
) -> Function:
    """Print the graph as one function.

    Args:
        gm: its placeholders become arguments, in order.
        name: of the function.
        names: of the nodes; by default each has its own, readable in the whole graph.
        inside: a block; layers in it are named as it sees them, and its weights are arguments
            that are passed by name.
    """
    graph, nodes = _readable_copy(gm.graph, names)
    code = graph.python_code("self")
    body = _body(code.src)
    made_in = {name: _made(node, nodes) for name, node in nodes.items()}
    text = [f"def {name}(", *_arguments(gm, nodes, inside), "):"]
    lines: dict[fx.Node, str] = {}
    layer = None
    for line in body:
        made = nodes.get(line.partition(" = ")[0].strip())
        if made is None or made.op == "placeholder":
            text.append(f"    {line}")
            continue
        written = made_in[line.partition(" = ")[0].strip()]
        if written == []:
            continue
        if not written and dynamo.module_name(made) != layer:
            layer = dynamo.module_name(made)
            text.append(f"  {_comment(relative(layer, inside) or _owner(inside))}")
        elif written:
            layer = None
        lines[made] = f"{line}{_comment(about(made))}"
        text += [f"    {part}" for part in written or [lines[made]]]
    imports = _imports(code.globals, "\n".join(text))
    return Function(text, imports, lines, gm, {node: name for name, node in nodes.items()})


def _made(node: fx.Node, nodes: Mapping[str, fx.Node]) -> list[str] | None:
    write: Callable[[Mapping[fx.Node, str]], list[str]] | None = node.meta.get(LINES)
    return write({n: name for name, n in nodes.items()}) if write else None


def _arguments(gm: fx.GraphModule, nodes: Mapping[str, fx.Node], inside: str) -> list[str]:
    lines = []
    if any(n.op in ("get_attr", "call_module") for n in gm.graph.nodes):
        lines.append("    self,")
    by_name = False
    for name, node in nodes.items():
        if node.op == "placeholder":
            if inside and weight_of(node) is not None and not by_name:
                lines.append("    *,")
                by_name = True
            about_it = node.meta.get("omniq_about") or describe(dynamo.value(node))
            lines.append(f"    {name},{_comment(about_it)}")
    return lines


def _owner(inside: str) -> str:
    return "(the block itself)" if inside else "(the model itself)"


def _comment(text: str) -> str:
    # Layers may be called anything, and a comment ends with its line.
    return f"  # {' '.join(text.splitlines())}" if text else ""


def _readable_copy(
    graph: fx.Graph, names: Mapping[fx.Node, str] | None
) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """Copy a graph with readable names; returns the originals by those names."""
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    originals: dict[str, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        name = readable_name(node) if names is None else names.get(node, node.name)
        new = copy.create_node(node.op, node.target, args, kwargs, name)
        if node.op == "placeholder":
            new.target = new.name
        copies[node] = new
        originals[new.name] = node
    return copy, originals


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
        elif not hasattr(thing, "__qualname__") and callable(thing):
            # What Dynamo makes of NumPy's functions are objects, which cannot be imported.
            lines.append(f"# {name}: {thing!r}")
        elif getattr(thing, "__module__", None):
            lines.append(f"from {thing.__module__} import {thing.__qualname__} as {name}")
    return lines
