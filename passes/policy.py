"""Decides each site: a scheme, or keep its own precision; always with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from omniq_compile.lowering import registry
from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.lowering.schemes import Scheme, w4a8
from omniq_compile.lowering.symbolic_sizes import traced_size
from omniq_compile.lowering.target import Target
from omniq_compile.passes import dynamo, moves, writes
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.expression import topological
from omniq_compile.passes.patterns import first_match
from omniq_compile.passes.regions import find_blocks, with_containers
from omniq_compile.passes.sites import Decision, Kind, Site

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOAT32_REASON = "kept in float32 by the model, beside layers of lower precision"
_BY_MATMUL = " (option 'matmul': True quantizes both operands)"


def main_device(devices: Iterable[torch.device]) -> str:
    """Return the device that a graph is compiled for whose tensors are on these: an accelerator
    goes before the CPU.
    """
    accelerators = sorted(str(d) for d in devices if d.type not in ("cpu", "meta"))
    return accelerators[0] if accelerators else "cpu"


def decide(
    sites: list[Site],
    config: QuantConfig,
    target: Target,
    low_precision: bool = False,
    device: str | None = None,
) -> None:
    """Set the decision of every site.

    Args:
        sites: of one graph.
        config: the options.
        target: to choose kernels for.
        low_precision: the model has layers of lower precision than float32, as these may have too.
        device: the graph's `main_device`; None where all products are on one.

    Raises:
        OptionError: the policy needs the order of the blocks, which this graph does not show.
    """
    low_precision = low_precision or any(
        s.kind is Kind.WEIGHT and s.dtype in (torch.bfloat16, torch.float16) for s in sites
    )
    leading = _in_leading_blocks(sites, config)
    graphs = {site.node.graph for site in sites}
    shared = {graph: writes.inputs_in_one_memory(graph) for graph in graphs}
    kind = None if device is None else torch.device(device).type
    for site in sites:
        reason = _keep(site, config, low_precision, leading)
        if reason is None and kind is not None and _device(site) not in (kind, "meta"):
            reason = f"it is on {_device(site)!r}, and this graph is compiled for {str(target)!r}"
        if reason is None and site.kind is Kind.WEIGHT:
            reason = _changed(site, shared[site.node.graph])
        if reason is not None:
            site.decision = Decision(None, reason)
            continue
        assert site.problem is not None
        if site.stored is not None:
            _check_stored(site, site.stored, config)
        scheme, note = _scheme(site, config)
        kernel, refusals = registry.choose(scheme, target, site.problem)
        if kernel is None:
            site.decision = Decision(None, refusals)
        else:
            reason = "; ".join(text for text in (note, refusals or kernel.about) if text)
            site.decision = Decision(scheme, reason, kernel)
    _keep_parts(sites)


def _keep_parts(sites: list[Site]) -> None:
    """Keep products whose result is part of a quantized weight, such as those of an adapter.

    They are computed with it, where a parameter changes, and no more in the graph.
    """
    whole: dict[fx.Node, Site] = {}
    for site in sites:
        if site.decision.scheme is not None and site.weight is not None:
            for node in topological(site.product.b.node):
                whole.setdefault(node, site)
    for site in sites:
        of = whole.get(site.node)
        if of is not None and site.decision.scheme is not None:
            site.decision = Decision(None, f"it computes a part of the weight of {of.layer!r}")


def _device(site: Site) -> str:
    """Return the type of the ``torch.device`` that a site multiplies on."""
    return str(dynamo.first_value(site.node).device.type)


def _scheme(site: Site, config: QuantConfig) -> tuple[Scheme, str]:
    """Return what a site multiplies in, and why that is not the method's own, if it is not."""
    pattern = first_match(config.w4a8_fallback_layers, site.layer)
    if pattern is not None and site.kind is Kind.WEIGHT:
        return w4a8(config.scheme), f"mxfp8 activations by {pattern!r}"
    return config.scheme, ""


def _check_stored(site: Site, stored: QuantizedTensor, config: QuantConfig) -> None:
    wanted = config.scheme.weight
    if stored.format != wanted:
        raise OptionError(
            f"the weight of {site.layer!r} is quantized already, as {stored.format}, and these "
            f"options ask for {wanted}. Compile with the options it was quantized by, quantize the "
            f"original model again, or keep the layer with 'ignored_layers': [{site.layer!r}]."
        )


def _in_leading_blocks(sites: list[Site], config: QuantConfig) -> set[int]:
    """Identify the sites of the first ``num_bf16_fallback_layers`` blocks that the graph runs."""
    if not config.num_bf16_fallback_layers or config.keep_all:
        return set()
    # A layer is in blocks, and is none, unless it holds other layers: a block may multiply itself.
    around = {id(s): with_containers(s.around) for s in sites}
    holders = {link.name for s in sites for link in around[id(s)] if link.name != s.layer}
    chains = {
        id(s): tuple(x for x in around[id(s)] if x.name != s.layer or x.name in holders)
        for s in sites
    }
    weights = {name for s in sites for name in s.weight_names if name}
    blocks = find_blocks(chains.values(), weights)
    if sites and (not blocks or dynamo.is_resumed()):
        raise OptionError(
            f"num_bf16_fallback_layers = {config.num_bf16_fallback_layers} keeps the leading "
            "blocks of the model in BF16, and this graph does not show which blocks it holds: it "
            "is one block compiled on its own, a part of a model after a graph break, or a model "
            "without repeated blocks. Use omniq_compile.compile(model, options), which knows every "
            "block; or set 'num_bf16_fallback_layers': 0."
        )
    order = list(dict.fromkeys(blocks[c] for c in chains.values() if c in blocks))
    leading = set(order[: config.num_bf16_fallback_layers])
    return {key for key, chain in chains.items() if blocks.get(chain) in leading}


def _keep(site: Site, config: QuantConfig, low_precision: bool, leading: set[int]) -> str | None:
    """Return why a site keeps its own precision, or None when it can be quantized."""
    if site.product.unsupported:
        return site.product.unsupported
    if site.kind is Kind.CONSTANT:
        return "both operands are parameters"
    if ignored := ignored_reason(config, site.layer):
        return ignored
    if mixed := _mixed_dtypes(site):
        return mixed
    if site.dtype not in DTYPES:
        return f"dtype {str(site.dtype).removeprefix('torch.')} is not quantized"
    if site.stored is not None:
        return None  # what to quantize was decided when it was
    if config.keep_all:
        return config.keep_all
    if id(site) in leading:
        return leading_reason(config)
    if site.kind is Kind.ACTIVATION and not config.matmul:
        return f"{_what_meets(site)}{_BY_MATMUL}"
    if site.dtype is torch.float32 and low_precision:
        return FLOAT32_REASON
    assert site.problem is not None
    return too_small(site.problem.K, site.problem.N, config.min_features)


def _what_meets(site: Site) -> str:
    """Word what the second operand is, where it is no weight."""
    if site.spelling != "linear":
        return "two activations"
    b = site.product.b.node
    while moves.is_move(b) and (sources := moves.sources(b)):
        b = sources[0]
    if b.op == "placeholder" and not dynamo.is_weight(b):
        return "its weight is an input, no parameter or buffer"
    return "its weight is computed in the graph"


def _changed(site: Site, shared: Mapping[fx.Node, list[fx.Node]]) -> str | None:
    """Return that the graph writes to a site's weight, or None."""
    changed = writes.changed_in_graph(site.product.b.node, shared)
    return "the graph changes its weight in place" if changed else None


def _mixed_dtypes(site: Site) -> str | None:
    """Return why torch refuses the product as it stands, or None; autocast casts to no float32."""
    dtypes = [dynamo.value(operand.node).dtype for operand in (site.product.a, site.product.b)]
    if dtypes[0] == dtypes[1] or (site.autocast and site.dtype is not torch.float32):
        return None
    names = " by ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{names}, which torch does not multiply"


def option_that_keeps(site: Site, config: QuantConfig) -> str | None:
    """Name the option by which a decided site is kept, or None where it is not by an option."""
    if site.spelling == "linear" and site.decision.reason.endswith(_BY_MATMUL):
        return "matmul"  # its weight is no parameter; other spellings are of activations
    if site.decision.scheme is not None or site.kind is not Kind.WEIGHT:
        return None
    problem = site.problem
    K, N = (problem.K, problem.N) if problem is not None else (None, None)
    return option_of(site.decision.reason, K, N, config)


def option_of(reason: str, K: Any, N: Any, config: QuantConfig) -> str | None:
    """Name the option that a layer ``[N, K]`` is kept by for this reason, or return None."""
    if reason in map(_ignored_by, config.ignored_layers):
        return "ignored_layers"
    if reason == leading_reason(config) or reason == config.keep_all:
        return "num_bf16_fallback_layers"
    return "min_features" if reason == _narrow(K, N, config.min_features) else None


def ignored_reason(config: QuantConfig, layer: str) -> str | None:
    """Word which pattern keeps a layer, or return None."""
    pattern = first_match(config.ignored_layers, layer)
    return None if pattern is None else _ignored_by(pattern)


def _ignored_by(pattern: str) -> str:
    return f"ignored by {pattern!r}"


def leading_reason(config: QuantConfig) -> str:
    """Word why a block is kept."""
    return f"in one of the {config.num_bf16_fallback_layers} leading blocks, which stay BF16"


def too_small(K: Any, N: Any, min_features: int) -> str | None:
    """Return why ``[N, K]`` is not worth quantizing, or None; symbolic sizes are not judged."""
    if isinstance(K, int) and K == 1:
        # Fourier features of a timestep are such a product: angles of many turns, which have to
        # be exact, and there is no arithmetic to save.
        return "K = 1: an outer product, which sums nothing"
    # A symbolic size occurs only between activations; it is not compared, because that would add a
    # guard. An amax of nothing cannot even be traced.
    for name, size in (("K", K), ("N", N)):
        if traced_size(size) == 0:
            return f"{name} = {size}: empty" + ("" if isinstance(size, int) else " when traced")
    if traced_size(K) is None:
        return f"K = {K}: known in each call alone, and may be nothing there"
    return _narrow(K, N, min_features)


def _narrow(K: Any, N: Any, min_features: int) -> str | None:
    for name, size in (("K", K), ("N", N)):
        if isinstance(size, int) and size < min_features:
            return f"{name} = {size} is under min_features = {min_features}"
    return None
