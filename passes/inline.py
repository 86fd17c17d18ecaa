"""Puts graphs that a graph merely calls in the place of the call, so that their products are found.

Dynamo makes such a graph of what `torch.compiler.nested_compile_region` marks, one for all calls
that are alike, and of what `torch.utils.checkpoint` wraps. Without gradients neither means more
than what it calls. A graph that is called under a condition or in a loop stays, see `match`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from omniq_compile.passes import dynamo, writes

# Where the operands of the called graph begin. Private, checked on torch 2.11 to 2.15.
_FIRST_OPERAND: dict[Any, int] = {
    torch.ops.higher_order.invoke_subgraph: 2,  # after the graph and its name
    torch.ops.higher_order.tag_activation_checkpoint: 1,
}


def inline(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace every call of a graph, also those in called graphs, by the operations of it.

    ``gm`` is changed and returned.
    """
    weights_of: dict[fx.GraphModule, Sequence[str | None]] = {}
    while calls := [node for node in gm.graph.nodes if _can_be_inlined(gm, node)]:
        for call in calls:
            _inline_one(gm, call, weights_of)
    return gm


def _can_be_inlined(gm: fx.GraphModule, call: fx.Node) -> bool:
    if call.target not in _FIRST_OPERAND:
        return False
    body = _body(gm, call)
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    return (
        len(inputs) == len(_operands(call))
        and all(user.target is operator.getitem for user in call.users)
        and all(isinstance(result, fx.Node) for _, result in _results(body, call))
    )


def _body(gm: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    assert isinstance(call.args[0], fx.Node)
    body = dynamo.called_graph(gm, call.args[0])
    assert body is not None
    return body


def _operands(call: fx.Node) -> tuple[Any, ...]:
    return call.args[_FIRST_OPERAND[call.target] :]


def _results(body: fx.GraphModule, call: fx.Node) -> list[tuple[fx.Node, Any]]:
    """Return each user of a call, and what the called graph returns there."""
    outputs: Any = body.graph.output_node().args[0]
    if not isinstance(outputs, (tuple, list)):
        return [(user, None) for user in call.users]
    return [(user, outputs[cast(int, user.args[1])]) for user in call.users]


def _inline_one(
    gm: fx.GraphModule, call: fx.Node, weights_of: dict[fx.GraphModule, Sequence[str | None]]
) -> None:
    body, operands = _body(gm, call), _operands(call)
    weights = [_weight_name(operand) for operand in operands]
    places = _places(weights_of.setdefault(body, weights), weights)
    copies: dict[fx.Node, Any] = {}
    remaining = iter(operands)
    with gm.graph.inserting_before(call):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(remaining)
            elif inner.op != "output":
                copy = gm.graph.node_copy(inner, copies.__getitem__)
                copy.meta = dict(inner.meta)
                if places is not None:
                    dynamo.move_place(copy, *places)
                if inner.op == "get_attr":
                    copy.target = _adopt(gm, str(inner.target), body)
                copies[inner] = copy
    inputs = {n: copy for n, copy in copies.items() if n.op == "placeholder"}
    writes.called_with(inputs, [copy for n, copy in copies.items() if n not in inputs])
    for user, result in _results(body, call):
        user.replace_all_uses_with(copies[result])
        gm.graph.erase_node(user)
    attribute = call.args[0]
    gm.graph.erase_node(call)
    if isinstance(attribute, fx.Node) and not attribute.users:
        gm.graph.erase_node(attribute)


def _weight_name(operand: Any) -> str | None:
    is_weight = isinstance(operand, fx.Node) and dynamo.is_weight(operand)
    return dynamo.weight_name(operand) if is_weight else None


def _places(traced: Sequence[str | None], called: Sequence[str | None]) -> tuple[str, str] | None:
    """Return where the module is that a graph was traced in, and where that of this call is.

    They are what is left of the names of two weights without their common end; None where all
    weights are the same ones.
    """
    for old, new in zip(traced, called, strict=True):
        if old is None or new is None:
            continue
        ours, theirs = old.split("."), new.split(".")
        while ours and theirs and ours[-1] == theirs[-1]:
            ours.pop()
            theirs.pop()
        if ours or theirs:
            return ".".join(ours), ".".join(theirs)
    return None


def _adopt(gm: fx.GraphModule, name: str, body: fx.GraphModule) -> str:
    """Give the graph what an attribute of a called graph is; returns the attribute's new name."""
    thing = operator.attrgetter(name)(body)
    stem = name.replace(".", "_")
    new, count = stem, 0
    while getattr(gm, new, thing) is not thing:
        count += 1
        new = f"{stem}_{count}"
    setattr(gm, new, thing)
    return new
