"""Stored weights that a graph writes to, or gives to graphs that it calls: plain values in it.

AOTAutograd sees what is written into a wrapper subclass as a whole, and not into its views, which
are of values that the subclass does not hold; and operators that run graphs, such as `torch.cond`,
have no rule for one.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.passes import dynamo
from omniq_compile.passes.context import Context
from omniq_compile.passes.metadata import add_call, add_method
from omniq_compile.passes.writes import any_written, is_in_place


def written_weights(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Let the graph read the values of such a weight, and write to them.

    What was written is quantized at the graph's end. The sites of such a weight are kept.
    """
    inputs = [n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")]
    first = next((n for n in gm.graph.nodes if n.op != "placeholder"), gm.graph.output_node())
    for weight in inputs:
        if not isinstance(dynamo.value(weight), QuantizedTensor) or not any_written([weight]):
            continue
        written = any_written([weight], by_called_graphs=False) or any(
            _writes(gm, user) for user in weight.users
        )
        # Before what reads it first. An attribute may be behind that of a graph to be called.
        at = weight.next if weight.op == "get_attr" else first
        with gm.graph.inserting_before(at):
            # Its values as a tensor of their own: a copy of a stored weight is stored too.
            values = add_call(weight, torch.mul, weight, 1)
        weight.replace_all_uses_with(values, lambda user, values=values: user is not values)
        if written:
            with gm.graph.inserting_before(gm.graph.output_node()):
                add_method(weight, "copy_", weight, values)
    return gm


def _writes(gm: fx.GraphModule, call: fx.Node) -> bool:
    """Say whether a graph that an operator calls has an operation in place."""
    if not isinstance(call.target, HigherOrderOperator):
        return False
    graphs = filter(None, (dynamo.called_graph(gm, node) for node in call.all_input_nodes))
    return any(
        _writes(graph, node) if isinstance(node.target, HigherOrderOperator) else is_in_place(node)
        for graph in graphs
        for node in graph.graph.nodes
    )
