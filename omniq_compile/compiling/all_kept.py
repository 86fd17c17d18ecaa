"""Warns of a compile in which nothing is quantized, because the options keep every layer."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from omniq_compile.compiling.compiled_modules import is_compiled, original
from omniq_compile.compiling.traced_modules import modules_being_called
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.passes import dynamo
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.layer_names import layer_name
from omniq_compile.passes.policy import FLOAT32_REASON, ignored_reason, option_that_keeps
from omniq_compile.passes.sites import Kind, Site

logger = logging.getLogger("omniq")

# Of the reasons for keeping layers, this many are worded.
MOST_REASONS = 3
WHAT_TO_CHANGE = {
    "min_features": "a smaller 'min_features'",
    "ignored_layers": "fewer patterns in 'ignored_layers'",
    "num_bf16_fallback_layers": "a smaller 'num_bf16_fallback_layers'",
    "matmul": "'matmul': True, which quantizes in each call what is computed in it",
}
# Weights of these are not multiplied as a layer's are, however large. Those of embeddings may be.
NO_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_told: WeakKeyDictionary[nn.Module, set[QuantConfig]] = WeakKeyDictionary()


def commonest(reasons: Counter[str]) -> str:
    """Word why layers are kept: each reason once, with how many have it, the commonest first."""
    return "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(MOST_REASONS))


def what_to_change(options: Collection[str | None]) -> str:
    """Word what quantizes some layers that these options keep; "" where there are none."""
    changes = " or ".join(words for option, words in WHAT_TO_CHANGE.items() if option in options)
    return f". To quantize some, give {changes}" if changes else ""


class KeptLayers:
    """What became of the layers of one compile, whose graphs come one by one.

    Attributes:
        graphs: how many were added.
        products: how many sites they have.
    """

    def __init__(self) -> None:
        """Begin with no graph."""
        self.graphs = 0
        self.products = 0
        self._reasons: Counter[str] = Counter()
        self._options: set[str] = set()
        self._others = False
        self._told = False

    def add(self, config: QuantConfig, sites: Sequence[Site]) -> None:
        """Note one graph's sites, as decided by a configuration."""
        self.graphs += 1
        self.products += len(sites)
        for site in sites:
            option = option_that_keeps(site, config)
            if option is not None:
                ignored = option == "ignored_layers"  # the pattern may be one of omniq's own
                self._reasons["named by 'ignored_layers'" if ignored else site.decision.reason] += 1
                self._options.add(option)
            elif site.decision.scheme is not None or _could_be_quantized(site):
                self._others = True

    @property
    def all_by_options(self) -> bool:
        """Whether there are layers, and all are kept by options."""
        return bool(self._reasons) and not self._others

    def warn(self, model: str) -> None:
        """Say once that nothing is quantized, where `all_by_options`, and what to change."""
        if self._told or not self.all_by_options:
            return
        self._told = True
        logger.warning(
            "nothing in %s is quantized: its layers are kept (%s)%s",
            model,
            commonest(self._reasons),
            what_to_change(self._options),
        )


def warn_all_kept(config: QuantConfig, sites: Sequence[Site]) -> None:
    """Log once that a model has nothing quantized, where one graph is enough to know.

    The graph may be one of several: of a model that Dynamo breaks, or of blocks that are compiled
    one by one. So no parameter of all that is compiled in the model that is being called may be one
    that another graph quantizes.

    Args:
        config: of the compile.
        sites: of one graph, as decided.
    """
    if config.keep_all:
        return  # that is no option, which a user could change
    kept = KeptLayers()
    kept.add(config, sites)
    models = list(modules_being_called()) if kept.all_by_options else []
    if not models:
        return
    model = models[-1]
    told = _told.setdefault(model, set())
    parts, decided = _compiled_parts(model), set[str]()
    if models[0] is model:  # otherwise the names are those in a module of it
        parts, decided = [model], {layer for site in sites for layer in _layers_of(site, config)}
    if config not in told and not _another_graph_may(parts, config, decided):
        told.add(config)
        kept.warn(type(model).__name__)


def _could_be_quantized(site: Site) -> bool:
    """Say whether a kept site is a layer whose precision is ours to choose."""
    sums = site.problem is None or site.problem.K != 1
    return site.kind is Kind.WEIGHT and sums and site.decision.reason != FLOAT32_REASON


def _layers_of(site: Site, config: QuantConfig) -> set[str]:
    """Name what a site multiplies by: its layer, and all that a kept one computes its weight of."""
    product = site.product
    stack = [product.b.node] if option_that_keeps(site, config) == "matmul" else []
    if site.kind is Kind.CONSTANT:
        stack = [product.a.node, product.b.node]  # an adapter's, which name no layer
    seen = set(stack)
    while stack:
        node = stack.pop()
        # What another product returns has a layer of its own.
        inputs = [] if "omniq_site" in node.meta else node.all_input_nodes
        stack += [n for n in inputs if n not in seen]
        seen.update(inputs)
    names = map(dynamo.weight_name, filter(dynamo.is_weight, seen))
    return {site.layer, *(layer_name([name], "") for name in names)}


def _another_graph_may(
    parts: Sequence[nn.Module], config: QuantConfig, decided: Collection[str]
) -> bool:
    """Say whether what is compiled may have more to quantize than layers that were decided."""
    if config.num_bf16_fallback_layers:
        return False  # a model in several graphs is refused, see `passes.policy`
    if config.matmul:
        return True  # of activations, which no parameter shows
    return any(
        isinstance(tensor, QuantizedTensor) or _holds_matrix(tensor, config.min_features)
        for part in parts
        for name, tensor in _weights(part)
        if (layer := layer_name([name], "")) not in decided
        and ignored_reason(config, layer) is None
    )


def layers_in(models: Iterable[nn.Module]) -> list[str]:
    """Return the names of what may be layers of models: of their matrices, whatever holds them."""
    return [
        layer_name([name], "") for model in models for name, t in _weights(model) if t.dim() > 1
    ]


def _compiled_parts(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that are compiled on their own, or else the model."""
    parts = [original(module) for module in model.modules() if is_compiled(module)]
    return parts or [model]


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for place, module in model.named_modules():
        if not isinstance(module, NO_LAYERS):
            own = {**module._parameters, **module._buffers}
            for name, tensor in own.items():
                if tensor is not None:
                    yield f"{place}.{name}" if place else name, tensor


def _holds_matrix(tensor: torch.Tensor, min_features: int) -> bool:
    """Say whether neighbouring axes are rows and columns of a matrix that is wide enough."""
    shape = tensor.shape
    sizes = ((math.prod(shape[:at]), math.prod(shape[at:])) for at in range(1, len(shape)))
    wide = any(min(size) >= min_features for size in sizes)
    return tensor.is_floating_point() and wide
