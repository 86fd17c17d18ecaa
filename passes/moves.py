"""Operations that only move or select the elements of tensors, or cast them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from omniq_compile.passes import dynamo

# Of torch.ops.aten, which exported models are made of.
_OPERATORS = (
    "_to_copy", "alias", "cat", "chunk", "clone", "contiguous", "detach", "expand", "flatten",
    "narrow", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze",
    "stack", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view",
)  # fmt: skip


def _packet(name: str) -> Any:
    return getattr(torch.ops.aten, name)


def _overloads(name: str) -> list[Any]:
    packet = _packet(name)
    return [getattr(packet, overload) for overload in packet.overloads()]


# Those that make of the real and of the imaginary parts what they make of complex numbers.
MOVES_OF_PARTS: frozenset[Any] = frozenset(
    {
        "chunk", "clone", "contiguous", "detach", "flatten", "narrow", "permute", "reshape",
        "select", "split", "split_with_sizes", "squeeze", "swapaxes", "t", "to", "transpose",
        "unbind", "unflatten", "unsqueeze", "view", "expand", "bfloat16", "half", "float",
        "to_local",
        operator.getitem, getattr,
        torch.cat, torch.chunk, torch.clone, torch.concat, torch.flatten, torch.narrow,
        torch.permute, torch.reshape, torch.select, torch.split, torch.squeeze, torch.stack,
        torch.t, torch.transpose, torch.unbind, torch.unsqueeze,
        *(overload for name in _OPERATORS for overload in _overloads(name)),
        # What Dynamo makes of ``w.T`` and the like from torch 2.14 on; before that a `getattr`.
        *map(_packet, ("mH", "mT", "matrix_H", "numpy_T")),
    }
)  # fmt: skip

# By the name of a method, and of the function of torch's where there is one.
_NAMES = (
    "adjoint", "broadcast_to", "concatenate", "diagonal", "expand_as", "flip", "fliplr", "flipud",
    "hsplit", "hstack", "moveaxis", "movedim", "narrow_copy", "permute_copy", "positive",
    "ravel", "repeat", "repeat_interleave", "reshape_as", "roll", "rot90", "row_stack", "split",
    "split_with_sizes", "swapaxes", "swapdims", "tensor_split", "tile", "transpose_copy", "type",
    "type_as", "unflatten", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "view_as",
    "vsplit", "vstack",
)  # fmt: skip

# What Dynamo makes of ``tensor.data``. Private, checked on torch 2.11 to 2.15.
_DATA: Any = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]

# Cheap to repeat, and without effect on anything else, but where `writes.is_in_place` finds an
# ``out``; some only under a condition, see `is_move`.
MOVES: frozenset[Any] = MOVES_OF_PARTS | {
    *_NAMES, "double",
    *(getattr(torch, name) for name in _NAMES if hasattr(torch, name)),
    operator.pos, torch.as_tensor, torch.asarray, torch.atleast_2d, torch.detach, torch.dropout,
    torch.nn.functional.dropout, torch.nn.functional.pad, torch._C._nn.pad, _DATA,
}  # fmt: skip


def _draws_nothing(node: fx.Node) -> bool:
    """Say whether a dropout returns its input."""
    arguments = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    training = arguments.get("training", arguments.get("train", True))
    return bool(not training or arguments.get("p", 0.5) == 0)


def _repeats_to_a_known_size(node: fx.Node) -> bool:
    """Say whether only a number, or one beside a tensor (``output_size``), says how many there are.

    What a tensor's values say is known in each call alone, as how many rows a weight has then.
    """
    if isinstance((*node.args[1:], node.kwargs.get("repeats"))[0], int):
        return True
    return dynamo.is_tensor(node) and all(isinstance(n, int) for n in dynamo.value(node).shape)


def _stays_on_its_device(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not (dynamo.is_tensor(node) and isinstance(source, fx.Node) and dynamo.is_tensor(source)):
        return False
    return bool(dynamo.value(node).device == dynamo.value(source).device)


_CONDITIONS: dict[Any, Callable[[fx.Node], bool]] = {
    torch.dropout: _draws_nothing,
    torch.nn.functional.dropout: _draws_nothing,
    "repeat_interleave": _repeats_to_a_known_size,
    torch.repeat_interleave: _repeats_to_a_known_size,
    "type": _stays_on_its_device,
}


def is_move(node: fx.Node) -> bool:
    """Say whether the node moves, selects or casts elements of tensors, and does no more."""
    if node.op not in ("call_function", "call_method") or node.target not in MOVES:
        return False
    condition = _CONDITIONS.get(node.target)
    return condition is None or condition(node)


def sources(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values a node reads.

    Of the other tensor of ``w.to(x)`` or ``w.type_as(x)`` it reads the dtype, which is known, and
    the device, which has to be that of ``w``: else both are sources.
    """
    if _names_a_tensor(node) and _stays_on_its_device(node):
        return node.all_input_nodes[:1]
    return node.all_input_nodes


def _names_a_tensor(node: fx.Node) -> bool:
    other = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    return node.target in ("to", "type_as") and dynamo.is_tensor(other)


def spelled_out(node: fx.Node) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """Return the op, target and arguments of a move, of which all nodes are its `sources`."""
    if node.target is _DATA:
        return "call_method", "detach", node.args, {}
    is_cast = node.target == "type" or _names_a_tensor(node)
    if not is_cast or not _stays_on_its_device(node):
        return node.op, node.target, node.args, node.kwargs
    # What else it says, such as whether to copy, changes no values.
    return "call_method", "to", (node.args[0], dynamo.value(node).dtype), {}


def without_casts(node: fx.Node) -> fx.Node:
    """Return what a tensor was before casts to the dtype and device that it has already."""
    while node.target in ("to", "type_as", "type") and _stays_on_its_device(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if dynamo.value(source).dtype != dynamo.value(node).dtype:
            break
        node = source
    return node
