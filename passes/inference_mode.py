"""``torch.inference_mode()`` inside a graph, as gradients that are off.

AOTAutograd cannot trace a view of an input inside it ("Cannot set version_counter for inference
tensor"), and the quantized form of a linear has some of its scales. What a graph returns is the
same tensor in either mode: no compiled program makes inference tensors.
"""

from __future__ import annotations

import torch
from torch import fx

# As Dynamo writes the mode into a graph. Private, checked on torch 2.11 to 2.15.
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode

_SET_GRADIENTS = torch._C._set_grad_enabled


def gradients_off(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace inference mode by gradients that are off, and as they were behind it.

    Dynamo traces anew where gradients are on in one call and off in another.
    """
    is_on = torch.is_grad_enabled()
    before: dict[fx.Node, bool] = {}
    for node in list(gm.graph.nodes):
        if node.target is _SET_GRADIENTS:
            is_on = bool(node.args[0])
        elif node.target is _enter_inference_mode and node.args[0]:
            before[node] = is_on
            is_on = _set(node, False)
        elif node.target is _exit_inference_mode and node.args[0] in before:
            entered = node.args[0]
            is_on = _set(node, before[entered])
            gm.graph.erase_node(node)
            gm.graph.erase_node(entered)
    return gm


def _set(at: fx.Node, is_on: bool) -> bool:
    with at.graph.inserting_before(at):
        at.graph.call_function(_SET_GRADIENTS, (is_on,))
    return is_on
