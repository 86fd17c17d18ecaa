"""Stored weights that a graph writes to: plain values in it, quantized again at its end.

AOTAutograd sees what is written into a wrapper subclass as a whole, and not into its views, which
are of values that the subclass does not hold.
"""

from __future__ import annotations

import torch
from torch import fx

from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.passes import dynamo
from omniq_compile.passes.context import Context
from omniq_compile.passes.metadata import add_call, add_method
from omniq_compile.passes.writes import any_written


def written_weights(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Let all of the graph read and write the values of such a weight, which is not multiplied."""
    inputs = [n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")]
    for weight in inputs:
        if not isinstance(dynamo.value(weight), QuantizedTensor) or not any_written([weight]):
            continue
        with gm.graph.inserting_after(inputs[-1]):
            # Its values as a tensor of their own: a copy of a stored weight is stored too.
            values = add_call(weight, torch.mul, weight, 1)
        weight.replace_all_uses_with(values, lambda user, values=values: user is not values)
        with gm.graph.inserting_before(gm.graph.output_node()):
            add_method(weight, "copy_", weight, values)
    return gm
