"""The tanh of a gelu on GPUs, as the exponential that it is made of.

A GPU has no instruction for a tanh that is right to more than 11 bits, and computes one in about
30, of both of its branches. In a kernel that quantizes what a gelu returns, that is most of the
time.
"""

from __future__ import annotations

import math
import operator
from functools import partial

import torch
from torch import fx

from omniq_compile.passes import dynamo
from omniq_compile.passes.context import Context
from omniq_compile.passes.metadata import add_call

# Exported models are made of torch.ops.aten.
_GELU = (torch.nn.functional.gelu, torch.ops.aten.gelu.default)

# Types of `torch.device` for which Inductor generates Triton.
_GPUS = ("cuda", "xpu")


def sigmoid_gelu(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Replace ``gelu(x, approximate="tanh")`` by ``x / (1 + exp(-2 * u))`` for GPUs.

    ``u`` is the argument of its tanh, ``sqrt(2 / pi) * (x + 0.044715 * x**3)`` (Hendrycks and
    Gimpel, "Gaussian Error Linear Units", section 2), and ``1 + tanh(u)`` is twice the sigmoid of
    ``2 * u``. In float32, which PyTorch computes the other in too, this one is the more precise
    below zero, where ``1 + tanh(u)`` cancels. float64 and gelus of erf are left.
    """
    if context.target.torch_device in _GPUS:
        for node in list(gm.graph.nodes):
            if _is_tanh_gelu(node):
                _replace(node)
    return gm


def _is_tanh_gelu(node: fx.Node) -> bool:
    return (
        node.target in _GELU
        and len(node.args) == 1
        and node.kwargs == {"approximate": "tanh"}
        and dynamo.value(node).dtype is not torch.float64
    )


def _replace(node: fx.Node) -> None:
    # Of two, since a GPU has an instruction for its powers.
    factor = -2 * math.sqrt(2 / math.pi) / math.log(2)
    call = partial(add_call, node)
    with node.graph.inserting_before(node):
        x = call(torch.Tensor.to, node.args[0], torch.float32)
        cubic = call(operator.mul, call(operator.mul, x, x), 0.044715 * factor)
        exponential = call(torch.exp2, call(operator.mul, x, call(operator.add, cubic, factor)))
        quotient = call(operator.truediv, x, call(operator.add, exponential, 1.0))
        result = call(torch.Tensor.to, quotient, dynamo.value(node).dtype)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
