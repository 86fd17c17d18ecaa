"""What the walk knows of diffusers: which classes there are, their recipes, and a run of one."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from omniq_compile import QuantConfig
from omniq_compile.backend import bind
from omniq_compile.lowering.target import detect
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context
from omniq_compile.passes.sites import Site
from zoo import (
    recipes_classic,
    recipes_flux,
    recipes_image,
    recipes_other,
    recipes_video,
    recipes_wan,
)
from zoo.recipe import Draw, Recipe
from zoo.weights import build

_FAMILIES = (
    recipes_classic, recipes_flux, recipes_image, recipes_other, recipes_video, recipes_wan,
)  # fmt: skip
RECIPES: dict[str, Recipe] = {
    name: recipe for family in _FAMILIES for name, recipe in family.RECIPES.items()
}
METHODS = ("int8", "fp8", "mxfp8")


def exported_transformers() -> list[str]:
    """Return the names of the models that diffusers exports from ``diffusers.models.transformers``.

    The package and not the name decides: `HunyuanDiT2DModel` is one, and a U-Net is none.
    """
    found = []
    for name in dir(diffusers):
        cls = getattr(diffusers, name)
        if (
            inspect.isclass(cls)
            and issubclass(cls, diffusers.ModelMixin)
            and cls.__module__.startswith("diffusers.models.transformers.")
        ):
            found.append(name)
    return sorted(found)


def build_recipe(name: str) -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    """Return a model, and a function that draws the same inputs each time."""
    recipe = RECIPES[name]
    model = build(getattr(diffusers, name), recipe.config, recipe.dtype, recipe.scales)
    return model, lambda: recipe.inputs(Draw(recipe.dtype))


def tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors of a model's output, in their order."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def relative_error(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the norm of all differences over the norm of all that is expected."""
    difference = sum(float((a.double() - e.double()).square().sum())
                     for a, e in zip(actual, expected, strict=True))  # fmt: skip
    return (difference / sum(float(e.double().square().sum()) for e in expected)) ** 0.5


@dataclass
class Backend:
    """Compiles each graph once for every method; `method` says which of them a call uses.

    Dynamo traces a class once this way, and not once for each method, which is where the time
    goes. None runs the graph as Dynamo traced it: what plain ``torch.compile`` computes.

    Attributes:
        sites: of all graphs, by method.
        weights: the ids of the parameters that calls took quantized, by method. After a graph
            break a layer's name is relative to the function that Dynamo went on in, and one graph
            serves several layers, so only this says which layers of the model were rewritten.
    """

    methods: Sequence[str] = METHODS
    compiler: str = "eager"
    method: str | None = None
    sites: dict[str, list[Site]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    graphs: int = 0

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        forms: dict[str | None, Any] = {None: gm.forward}
        for method in self.methods:
            forms[method] = self._quantized(gm, inputs, method)
        return lambda *arguments: forms[self.method](*arguments)

    def _quantized(self, gm: fx.GraphModule, inputs: list[Any], method: str) -> Any:
        config = QuantConfig.from_options(
            {"method": method, "min_features": 1, "compiler": self.compiler}
        )
        context = Context(config, detect("cpu"))
        rewritten = pipeline.run(gm, context)
        self.sites[method] += context.sites
        names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        leaves = [leaf for binding in context.bindings for leaf in binding.leaves]
        compiled = bind(gm, rewritten, context, inputs)

        def run(*arguments: Any) -> Any:
            given = dict(zip(names, arguments, strict=True))
            self.weights[method] |= {
                id(given[leaf] if isinstance(leaf, str) else leaf) for leaf in leaves
            }
            return compiled(*arguments)

        return run


def linears_that_run(model: nn.Module, inputs: dict[str, Any]) -> tuple[set[str], Any]:
    """Run a model as it stands; return the linear layers it called, by hooks, and its output."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    output = model(**inputs)
    for hook in hooks:
        hook.remove()
    return called, output
