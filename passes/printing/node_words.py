"""What a node is called, and what is said of it: its dtype and shape, its layer, its decision."""

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

# What Dynamo puts before the name of an argument, or of a module's attribute that is a tensor: from
# torch 2.12 on with "dict".
_DYNAMOS = re.compile(r"^l_(kwargs_)?(self_(dict_)?modules_)?")


def relative(name: str, inside: str) -> str:
    """Name a layer or weight as the block that it is in sees it."""
    if inside and (name == inside or name.startswith(f"{inside}.")):
        return name[len(inside) + 1 :]
    return name


def describe(value: Any) -> str:
    """Word a value's dtype and shape, such as ``bf16[1, 1024, 3072]``."""
    if isinstance(value, torch.Tensor):
        shape = ", ".join(str(size) for size in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{shape}]"
    if isinstance(value, (list, tuple)):
        return ", ".join(describe(v) for v in value)
    return type(value).__name__ if value is not None else ""


def is_result(node: fx.Node) -> bool:
    """Say whether the node gives the result of a GEMM site."""
    return "omniq_site" in node.meta and (
        "omniq_added" not in node.meta or "omniq_name" in node.meta
    )


def about(node: fx.Node) -> str:
    """Word what a node gives: dtype and shape, and for a site its decision."""
    text = describe(dynamo.value(node))
    if not is_result(node):
        return text
    site: Site = node.meta["omniq_site"]
    decision = site.decision
    if decision.kernel is None:
        return f"{text}  kept: {decision.reason}"
    return f"{text}  {decision.method}: {decision.kernel.name}"


def weight_of(node: fx.Node) -> str | None:
    """Return the dotted name of the parameter, buffer or quantized part that an input is."""
    if "omniq_weight" in node.meta:
        return str(node.meta["omniq_weight"])
    return dynamo.weight_name(node) if dynamo.is_weight(node) else None


def readable_name(node: fx.Node) -> str:
    """Return the node's name as the model wrote it; FX makes it unique in the graph."""
    if "omniq_name" in node.meta:
        return str(node.meta["omniq_name"])
    weight = weight_of(node)
    if weight is not None:
        return identifier(weight)
    if node.op == "placeholder":
        return _DYNAMOS.sub("", node.name).removesuffix("_") or node.name
    return re.sub(r"_default(_\d+)?$", r"\1", node.name)


def identifier(text: str) -> str:
    """Spell a name so that Python takes it for a variable."""
    return re.sub(r"\W", "_", text)
