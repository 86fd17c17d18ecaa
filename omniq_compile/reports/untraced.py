"""Linear layers that no product of a trace multiplies by."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx, nn
from torch._ops import HigherOrderOperator

from omniq_compile.compiling.compiled_modules import original
from omniq_compile.passes import dynamo
from omniq_compile.passes.context import Context
from omniq_compile.passes.expression import is_moved_weight
from omniq_compile.passes.layer_names import layer_name


class UntracedLinears:
    """The linear layers of a model that were in no graph yet; graphs come one by one.

    They are told by their parameters, whatever Dynamo calls these: a weight that several layers
    hold is found once for all of them.
    """

    def __init__(self, model: nn.Module) -> None:
        """Begin with all of a model's linear layers."""
        # What Dynamo compiled it never lets go of, and the graphs' functions refer to this.
        self._layers = {
            layer_name([], name): weakref.ref(module)
            for name, module in original(model).named_modules()
            if isinstance(module, nn.Linear)
        }

    @property
    def names(self) -> list[str]:
        """What is left, in the model's order."""
        return list(self._layers)

    def watched(self, gm: fx.GraphModule, context: Context) -> Callable[..., Any]:
        """Return what runs a graph as it is, and takes off the layers that it has products of.

        It does so in each call: Dynamo runs one graph for all modules that it fits, and hooks may
        bring weights for a call only.

        Args:
            gm: a graph of Dynamo's.
            context: what the passes made of it, with the stage traced.
        """
        assert context.stages is not None
        weights = {node.name for node in _weights_of_products(context.stages["traced"].graph)}
        inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        places = [place for place, name in enumerate(inputs) if name in weights]
        # With Inductor's ``freezing`` they are attributes of the graph.
        attributes = [n for n in gm.graph.nodes if n.op == "get_attr" and n.name in weights]

        def run(*arguments: Any) -> Any:
            read = [arguments[place] for place in places]
            self._take_off([*read, *(operator.attrgetter(str(n.target))(gm) for n in attributes)])
            return gm.forward(*arguments)

        return run

    def _take_off(self, read: Sequence[Any]) -> None:
        numbers = set(map(id, read))
        for name, reference in list(self._layers.items()):
            module = reference()
            if module is None or any(id(tensor) in numbers for tensor in _own_tensors(module)):
                del self._layers[name]


def _own_tensors(module: nn.Module) -> Iterator[Any]:
    yield from module.parameters()
    yield from module.buffers()
    yield vars(module).get("weight")  # what took a parameter's place may be neither


def _weights_of_products(graph: fx.Graph) -> set[fx.Node]:
    """Return the inputs and attributes that products read as a weight, or compute one of."""
    stack: list[fx.Node] = []
    for node in graph.nodes:
        stack += _operands(node)
    found, seen = set(), set(stack)
    while stack:
        node = stack.pop()
        if node.op in ("placeholder", "get_attr"):
            found.add(node)
        # What another product returns is no part of this one's weight.
        inputs = [] if "omniq_site" in node.meta else node.all_input_nodes
        stack += [n for n in inputs if n not in seen]
        seen.update(inputs)
    return found


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    if isinstance(node.target, HigherOrderOperator):
        # Products in the graphs that it calls are sites, by which their weights come.
        yield from filter(dynamo.is_weight, node.all_input_nodes)
    elif (site := node.meta.get("omniq_site")) is not None:
        # Of several weights in one call, such as a cell's, the site names one.
        second = site.product.b.node.name
        yield from (n for n in node.all_input_nodes if is_moved_weight(n) or n.name == second)
