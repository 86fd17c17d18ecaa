"""Which modules the graph is part of that Dynamo is compiling."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from types import FrameType, MethodType
from typing import Any

import torch
from torch import fx, nn

from omniq_compile.compiling.compiled_modules import original
from omniq_compile.passes import dynamo
from omniq_compile.passes.names import WeightNames


def traced_modules() -> list[nn.Module]:
    """Return the modules whose methods are compiled or wait for it, the innermost first.

    Those around them that are not compiled are left out. Of a function that is no method, the
    first is the module in whose method it is called; if there is none, the only module that it
    reads.
    """
    given = dynamo.traced_locals()
    waiting = list(_waiting(sys._getframe()))
    own = _module(given.get("self"))
    if own is None and not waiting:
        read = {id(module): module for module in map(_module, given.values()) if module is not None}
        own = next(iter(read.values())) if len(read) == 1 else None
    found = waiting if own is None else [own, *waiting]
    return list({id(module): module for module in found}.values())


def modules_being_called() -> Iterator[nn.Module]:
    """Yield the modules whose methods are on the stack, compiled or not, the innermost first.

    Those that ``torch.compile`` wrapped are as they were before.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = _module(_own_object(frame))
        if module is not None:
            yield module
        frame = frame.f_back


def model_around() -> nn.Module | None:
    """Return the model that the graph is part of: the outermost module that is compiled, or where
    that is a block which a module around it has several of, that module.
    """
    compiled = traced_modules()[-1:]
    if not compiled:
        return None
    (block,) = compiled
    repeating = (module for module in modules_being_called() if _repeats(module, block))
    return next(repeating, block)


def _repeats(model: nn.Module, block: nn.Module) -> bool:
    """Say whether some container of a model holds a block beside others of its class."""
    for container in model.modules():
        numbered = [child for name, child in container.named_children() if name.isdigit()]
        if any(child is block for child in numbered):
            return sum(type(child) is type(block) for child in numbered) > 1
    return False


def weight_names(
    gm: fx.GraphModule, inputs: Sequence[Any], module: nn.Module | None
) -> WeightNames:
    """Return the names that a module has for the inputs of a graph which are its own tensors.

    Args:
        gm: the graph as Dynamo traced it.
        inputs: those that it was traced with.
        module: whose parameters and buffers they may be.
    """
    if module is None:
        return {}
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in _named_tensors(module):
        names[id(tensor)].append(name)
    placeholders = gm.graph.find_nodes(op="placeholder")
    pairs = zip(placeholders, inputs, strict=True)
    return {node.name: names[id(tensor)] for node, tensor in pairs if id(tensor) in names}


def _named_tensors(
    module: nn.Module, around: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers of a module by each of their names.

    PyTorch's ``named_parameters(remove_duplicate=False)`` never ends where a module holds one
    around it, as the blocks do that cache-dit puts into a model for the time of its call.
    """
    for name, tensor in chain(module._parameters.items(), module._buffers.items()):
        if tensor is not None:
            yield name, tensor
    around = (*around, module)
    for place, child in module._modules.items():
        if child is not None and child not in around:
            for name, tensor in _named_tensors(child, around):
                yield f"{place}.{name}", tensor


def _waiting(frame: FrameType | None) -> Iterator[nn.Module]:
    """Yield the modules on the stack between Dynamo and the call of what ``torch.compile`` made.

    Dynamo's own frames come first; private, checked on torch 2.11 to 2.15: `convert_frame` is among
    them, and what is compiled is called by `eval_frame`.
    """
    in_dynamo = True
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if file.endswith("torch/_dynamo/convert_frame.py"):
            in_dynamo = False
        elif not in_dynamo and file.endswith("torch/_dynamo/eval_frame.py"):
            return
        module = None if in_dynamo else _module(_own_object(frame))
        if module is not None:
            yield module
        frame = frame.f_back


def _own_object(frame: FrameType) -> Any:
    """Return what a method is called on; None for other functions.

    Their locals are not read: before Python 3.13 a frame keeps what its `f_locals` showed, and a
    model that is deleted in a function which goes on would stay.
    """
    arguments = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    return frame.f_locals.get("self") if arguments[:1] == ("self",) else None


def _module(value: Any) -> nn.Module | None:
    if isinstance(value, MethodType):
        value = value.__self__
    return original(value) if isinstance(value, nn.Module) else None
