"""One quantize node for all that multiply the same activation, such as q, k and v."""

from __future__ import annotations

from typing import Any

from torch import fx

from omniq_compile.passes.context import Context
from omniq_compile.passes.rewrite import QUANTIZE
from omniq_compile.passes.writes import is_in_place


def share(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Let equal quantize nodes be one.

    Sound only while the activation stays what it was, and Dynamo's graph has in-place operations:
    after any of those, nodes seen before are not shared. The steps that a rewrite put before a
    quantize node (a transpose) are shared by the same rule.
    """
    seen: dict[Any, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if is_in_place(node):
            seen.clear()
        if not _is_shareable(node):
            continue
        key = (node.op, node.target, node.args)
        if key in seen:
            node.replace_all_uses_with(seen[key])
            gm.graph.erase_node(node)
        else:
            seen[key] = node
    return gm


def _is_shareable(node: fx.Node) -> bool:
    """Quantize nodes, and the steps of a rewrite that lead to nothing but quantize nodes."""
    if "omniq_added" not in node.meta:
        return False
    if node.target is QUANTIZE:
        return True
    # A step is a method call. Products are not followed: what they lead to has no end.
    users = node.users if node.op == "call_method" else ()
    return bool(users) and all(_is_shareable(user) for user in users)
