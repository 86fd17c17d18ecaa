"""What the passes of one compile share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import as_stored
from omniq_compile.lowering.target import Target
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.expression import WeightExpression
from omniq_compile.passes.names import WeightNames
from omniq_compile.passes.sites import Site


@dataclass(frozen=True)
class Binding:
    """A quantized weight: the inputs that stand for it, and where its values come from.

    Attributes:
        format: of the quantized weight.
        expression: the weight from its parameters.
        leaves: names of the parameter placeholders of the traced graph, or the parameters
            themselves where Dynamo made them attributes.
        parts: names of the placeholders added for the method's parts.
        layers: the layers that multiply by this weight.
        shape: of the weight, ``[..., N, K]``.
        dtype: of the weight before quantization.
        stored: the parameter is a `QuantizedTensor`, whose parts are used as they are.
        arrange: gives them the layout that the kernel reads, see `Kernel.arrange`.
    """

    format: str
    expression: WeightExpression
    leaves: tuple[str | torch.Tensor, ...]
    parts: tuple[str, ...]
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: bool
    arrange: Callable[[Parts], Parts] = as_stored


@dataclass
class PassRecord:
    """One pass as it ran: seconds, and the change in the number of nodes per operator."""

    name: str
    seconds: float
    delta: dict[str, int]


@dataclass
class Context:
    """Options in, findings out.

    Attributes:
        config: the options.
        target: to lower for.
        weight_names: of the weights among the graph's inputs, as the model has them; see `names`.
        low_precision: the model has layers of lower precision than float32, wherever they are.
        sites: the products, each with its decision.
        bindings: the quantized weights.
        records: the passes as they ran.
        stages: copies of the graph at the end of each stage, by its name; None is none.
    """

    config: QuantConfig
    target: Target
    weight_names: WeightNames = field(default_factory=dict)
    low_precision: bool = False
    sites: list[Site] = field(default_factory=list)
    bindings: list[Binding] = field(default_factory=list)
    records: list[PassRecord] = field(default_factory=list)
    stages: dict[str, fx.GraphModule] | None = None
