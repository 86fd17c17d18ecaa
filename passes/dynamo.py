"""What Dynamo says of the nodes of a graph: their names, places, devices and values.

Checked on torch 2.11 to 2.15: ``example_value``, ``nn_module_stack``, ``tensor_dict`` and
``grapharg`` in ``node.meta``, ``node._dynamo_source`` on placeholders, ``dynamo_compile_id`` in
``gm.meta``, ``gm._param_name_to_source``, autocast as ``torch.amp._enter_autocast`` with the
arguments of ``torch.autocast`` and ``torch.amp._exit_autocast`` of its node, and values under
``vmap`` as functorch's wrappers of fake tensors.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from omniq_compile.passes.regions import Link, link_to

# A string literal, or a word, in the expression by which Dynamo names a module. It calls `getattr`
# for a name that is no identifier; what follows a dot may be one too.
_NAME_PART = re.compile(
    r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?:getattr\()|"""
    r"""((?<=\.)[^.\[\]'"]+?(?=[.\[]|, ['"]|$)|[^.\[\]'"(),\s]+)"""
)
_NOT_LAYERS = {"_modules", "_parameters", "_buffers", "_orig_mod", "__dict__"}

# A local variable, and the names that lead from it to a module or a tensor; or those names alone.
Path = tuple[str, ...]

# The name of a weight where it is not that which Dynamo finds it by.
_WEIGHT_NAME = "omniq_weight_name"


def value(node: fx.Node) -> Any:
    """Return the fake tensor, symbolic number or constant that the node stands for."""
    return node.meta.get("example_value")


def set_value(node: fx.Node, found: Any) -> None:
    """Give a new node its fake tensor, symbolic number or constant."""
    node.meta["example_value"] = found


def copy_place(node: fx.Node, of: fx.Node) -> None:
    """Give a new node the place in the model of the one that it is part of, or stands for."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in of.meta:
            node.meta[key] = of.meta[key]


def copy_source(placeholder: fx.Node, of: fx.Node) -> None:
    """Give a copy of a placeholder the expression of the user's program that its value is."""
    if hasattr(of, "_dynamo_source"):
        placeholder._dynamo_source = of._dynamo_source  # type: ignore[attr-defined]


def drop_place(node: fx.Node) -> None:
    """Forget which modules made a node."""
    node.meta.pop("nn_module_stack", None)


def move_place(node: fx.Node, old: str, new: str) -> None:
    """Have module ``old``, where a node is in it, stand at the place ``new`` of the model."""
    stack = node.meta.get("nn_module_stack") or {}
    node.meta["nn_module_stack"] = {
        key: (_moved(path, old, new), kind) for key, (path, kind) in stack.items()
    }


def move_places(node: fx.Node, moved: Mapping[Path, Path]) -> None:
    """Have modules of some paths, and those in them, stand at other places of the model.

    Args:
        node: that the modules made.
        moved: from a local variable and the names that lead to a module, to the names in the model.
    """
    stack = node.meta.get("nn_module_stack") or {}
    places = {key: (_path(text), text, kind) for key, (text, kind) in stack.items()}
    node.meta["nn_module_stack"] = {
        key: (_at(_longest(path, moved)) if path else text, kind)
        for key, (path, text, kind) in places.items()
    }


def is_tensor(node: Any) -> bool:
    """Say whether an argument is a node that holds a tensor."""
    return isinstance(node, fx.Node) and isinstance(value(node), torch.Tensor)


def first_value(node: fx.Node) -> Any:
    """Return a node's fake value, or the first of several."""
    found = value(node)
    return found[0] if isinstance(found, tuple) and found else found


def devices(graph: fx.Graph) -> set[torch.device]:
    """Return the devices of all tensors in a graph, its inputs among them."""
    return {value(node).device for node in graph.nodes if is_tensor(node)}


def is_transformed(node: fx.Node) -> bool:
    """Say whether ``torch.func`` wraps the tensor, as ``vmap`` does to hide an axis.

    Custom operators have no rule for it.
    """
    return _is_wrapped(value(node))


def unwrapped(found: Any) -> Any:
    """Return the tensor that ``torch.func`` computes with, which alone has memory."""
    while _is_wrapped(found):
        found = torch._C._functorch.get_unwrapped(found)
    return found


def _is_wrapped(found: Any) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return isinstance(found, torch.Tensor) and wrapped(found)


def known(size: Any) -> Any:
    """Return a size as a number where it is one: a symbol may have turned out to be, such as the K
    of an input with ``dynamic=True``, which the weight fixes.
    """
    return int(size) if is_concrete_int(size) else size


def is_weight(node: fx.Node) -> bool:
    """Say whether the node is a parameter or buffer of the model: the same tensor every call.

    With Inductor's ``freezing`` on, Dynamo installs parameters as attributes of the graph
    instead of passing them as inputs.
    """
    if not isinstance(value(node), torch.Tensor):
        return False
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    if isinstance(value(node), torch.nn.Parameter):
        return True
    # accelerate's hooks put tensors that are no `nn.Parameter` among the parameters of a module.
    return any(place in _source_name(node) for place in ("._parameters[", "._buffers["))


def under_autocast(graph: fx.Graph) -> set[fx.Node]:
    """Return the tensors that are computed with autocast on for their device.

    The graph begins with what is on now: Dynamo calls a backend in the state of the traced call,
    and traces anew in another.
    """
    on: dict[str, bool] = {}
    before: dict[fx.Node, dict[str, bool]] = {}
    found = set()
    for node in graph.nodes:
        if node.target is _enter_autocast:
            device, _, enabled = node.args[:3]
            before[node] = on
            on = on | {device: enabled}
        elif node.target is _exit_autocast:
            on = before[node.args[0]]
        elif is_tensor(node):
            device = value(node).device.type
            if device not in on:
                available = torch.amp.is_autocast_available(device)
                on = on | {device: available and torch.is_autocast_enabled(device)}
            if on[device]:
                found.add(node)
    return found


def weight_name(node: fx.Node) -> str:
    """Return the dotted name of a parameter or buffer, such as ``blocks.0.attn.to_q.weight``."""
    if _WEIGHT_NAME in node.meta:
        return str(node.meta[_WEIGHT_NAME])
    source = _source_name(node)
    if source:
        return _dotted(source)
    # As an attribute of the graph it has a name of Dynamo's own, such as L__self___blocks_0_weight.
    owner = node.graph.owning_module
    names = owner.meta.get("dynamo_flat_name_to_original_fqn", {}) if owner is not None else {}
    return str(names.get(node.target, node.target))


def set_weight_name(node: fx.Node, name: str) -> None:
    """Call a parameter or buffer by another dotted name than Dynamo does."""
    node.meta[_WEIGHT_NAME] = name


def weight_path(node: fx.Node) -> Path:
    """Return the local variable by which Dynamo finds a parameter or buffer, and the names that
    lead from it to the tensor; nothing where it is found in another way.
    """
    return _path(_source_name(node))


def names_in(name: str) -> Path:
    """Return the parts of a dotted name, without those that Dynamo's names are without."""
    return tuple(part for part in name.split(".") if part not in _NOT_LAYERS)


def module_name(node: fx.Node) -> str:
    """Return the dotted name of the innermost module that made the node; "" for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return _dotted(path)


def is_in_linear(node: fx.Node) -> bool:
    """Say whether the innermost module that made the node is an ``nn.Linear``."""
    stack = node.meta.get("nn_module_stack") or {}
    kind = list(stack.values())[-1][1] if stack else None
    return isinstance(kind, type) and issubclass(kind, torch.nn.Linear)


def modules_around(node: fx.Node) -> tuple[Link, ...]:
    """Return each module the node was traced in, outermost first, the root left out."""
    stack = node.meta.get("nn_module_stack") or {}
    links = (link_to(_dotted(path), kind) for path, kind in stack.values())
    return tuple(link for link in links if link.name)


def called_graph(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """Return the graph that an argument of an operator is, such as a branch of `torch.cond`."""
    thing = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
    return thing if isinstance(thing, fx.GraphModule) else None


def _moved(path: str, old: str, new: str) -> str:
    name = _dotted(path)
    if name != old and not name.startswith(f"{old}."):
        return path
    return _at(tuple(f"{new}{name.removeprefix(old)}".split(".")))


def _longest(path: Path, moved: Mapping[Path, Path]) -> Path:
    """Return a path's place in the model, by the longest of its beginnings that was moved."""
    for length in range(len(path), 0, -1):
        if path[:length] in moved:
            return moved[path[:length]] + path[length:]
    return path[1:]


def _at(names: Path) -> str:
    """Return the expression of a module in the model, as Dynamo writes it."""
    return "L['self']" + "".join(f"._modules[{name!r}]" for name in names)


def is_resumed() -> bool:
    """Say whether the graph being compiled continues a function after a graph break."""
    frame = _traced_frame()
    return frame is not None and frame.f_code.co_name.startswith("torch_dynamo_resume")


def traced_locals() -> Mapping[str, Any]:
    """Return the local variables, as its caller gave them, of the function being compiled."""
    frame = _traced_frame()
    return {} if frame is None else frame.output.root_tx.f_locals


def _traced_frame() -> Any:
    """Return what Dynamo knows of the function that it is tracing; None outside a compile.

    Reads ``InstructionTranslator.current_tx``, checked on torch 2.11 to 2.15: outside a compile
    there is no frame, which 2.12 says with None.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:
        return None


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph; tensors and submodules are shared, metadata dicts are not.

    Dynamo reads the original's placeholders again after the backend returns. The copy still passes
    for a graph of Dynamo's, so that AOTAutograd learns which inputs stay where they are.
    Placeholders that a pass adds need `mark_weight_input` for that.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(gm.graph, copies)
    graph.output(outputs)
    for original, copy in copies.items():
        copy.meta = dict(original.meta)
        # It refers weakly to the tensor, and `Module.to` swaps no parameter that is referred to.
        # Dynamo takes it from the original's nodes too, once the backend has returned.
        copy.meta.pop("grapharg", None)
        copy_source(copy, original)
    result = fx.GraphModule(gm, graph)
    result.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        result._param_name_to_source = gm._param_name_to_source
    return result


def mark_weight_input(node: fx.Node) -> None:
    """Mark a placeholder that a pass adds as a tensor that stays at its address from call to call.

    A CUDA graph then reads it where it is, as it does parameters, instead of from a copy that is
    filled in each replay; at another address the graph is recorded anew. There is no source in the
    user's program, which AOTAutograd takes as None.
    """
    node._dynamo_source = None  # type: ignore[attr-defined]
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def _source_name(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _dotted(path: str) -> str:
    """Turn ``L['self']._modules['blocks']._modules['0']`` or ``L['self'].blocks.0`` to blocks.0"""
    return ".".join(_path(path)[1:])


def _path(path: str) -> Path:
    """Turn the same to (self, blocks, 0)."""
    parts = [
        ast.literal_eval(literal) if literal else word
        for literal, word in _NAME_PART.findall(path)
        if literal or word
    ]
    return tuple(part for part in parts[1:] if part not in _NOT_LAYERS)
