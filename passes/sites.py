"""A GEMM site, the decision on it, and the normal form that every spelling is brought to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme
from omniq_compile.passes import dynamo
from omniq_compile.passes.expression import Step, WeightExpression, is_moved_weight
from omniq_compile.passes.layer_names import layer_name
from omniq_compile.passes.regions import Link

TRANSPOSE: Step = ("transpose", (-1, -2))


@dataclass(frozen=True)
class Operand:
    """A node, and the steps that bring it to the normal form's layout."""

    node: fx.Node
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Product:
    """The normal form: ``out_steps(a @ b.transpose(-1, -2)) * alpha + bias * beta``.

    After its steps ``a`` is ``[..., M, K]`` and ``b`` is ``[N, K]`` or ``[..., N, K]``.
    ``unsupported`` says why this spelling has no such form.
    """

    a: Operand
    b: Operand
    bias: fx.Node | None = None
    alpha: Any = 1
    beta: Any = 1
    out_steps: tuple[Step, ...] = ()
    unsupported: str | None = None


def product_of_several(operands: Sequence[fx.Node], reason: str) -> Product:
    """Name a product of several tensors in one call by two of them, a weight if there is one."""
    weights = [n for n in operands if is_moved_weight(n)]
    b = max(weights, key=lambda n: int(dynamo.value(n).dim()), default=operands[-1])
    a = next((n for n in operands if n not in weights), operands[0])
    return Product(Operand(a), Operand(b), unsupported=reason)


def is_one(number: Any) -> bool:
    """Say whether a factor is 1 in every call."""
    return not isinstance(number, fx.Node) and number == 1


def bias_in_epilogue(product: Product, N: Any) -> bool:
    """Say whether a GEMM's epilogue adds the bias: N elements to ``a @ b.T`` as it stands."""
    if product.bias is None:
        return False
    bias = dynamo.value(product.bias)
    # PyTorch broadcasts a bias of one element, and takes one of any stride; kernels read N beside
    # each other, `torch._scaled_mm` whatever the stride is. Where sizes are symbolic, a plain
    # comparison would add a guard.
    return (
        bias.dim() == 1
        and statically_known_true(bias.shape[0] == N)
        and statically_known_true(bias.stride(0) == 1)
        and is_one(product.alpha)
        and is_one(product.beta)
        and TRANSPOSE not in product.out_steps
    )


class Kind(Enum):
    """What meets in a site."""

    WEIGHT = "weight x activation"
    ACTIVATION = "activation x activation"
    CONSTANT = "weight x weight"


@dataclass(frozen=True)
class Decision:
    """What becomes of a site: a scheme, or None to keep its own precision; always a reason."""

    scheme: Scheme | None
    reason: str
    kernel: Kernel | None = None

    @property
    def method(self) -> str | None:
        """The method as a user spells it."""
        return self.scheme.method if self.scheme else None


@dataclass
class Site:
    """One place in the traced graph where an activation meets a matrix.

    ``weight_names`` are the dotted names of the parameters that the weight is made of, in order; ""
    for one that a function takes as an argument. ``around`` are the modules it was traced in,
    outermost first, the root left out. ``stored`` is the weight, without values, where it is a
    parameter that is quantized already. ``autocast`` says that it was on, which casts both
    operands, and ``gradients`` that the model asks for them here, whatever its caller does.
    """

    node: fx.Node
    spelling: str
    layer: str
    kind: Kind
    product: Product
    problem: Problem | None
    weight: WeightExpression | None
    weight_names: tuple[str, ...]
    around: tuple[Link, ...] = ()
    stored: QuantizedTensor | None = None
    autocast: bool = False
    gradients: bool = False
    decision: Decision = field(default_factory=lambda: Decision(None, "not decided"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the site's result, or of the first of several."""
        dtype: torch.dtype = dynamo.first_value(self.node).dtype
        return dtype

    @property
    def weight_name(self) -> str:
        """The weight's names as one, such as ``to_q.weight + to_k.weight``."""
        return " + ".join(filter(None, self.weight_names))

    def layer_in(self, place: str) -> str:
        """Return the layer's name in a model that has the traced module at ``place``."""
        weights = self.weight_names
        if layer_name(weights, self.layer) != self.layer:
            weights = ()  # it is called as its module is
        return layer_name(weights, self.layer, place)
