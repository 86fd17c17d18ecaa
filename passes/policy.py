"""Decides each site: a method, or keep its own precision; always with the reason."""

from __future__ import annotations

import torch

from omniq_compile.lowering import registry
from omniq_compile.lowering.target import Target
from omniq_compile.passes import expression
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.patterns import first_match
from omniq_compile.passes.sites import Decision, Kind, Site

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def decide(sites: list[Site], config: QuantConfig, target: Target) -> None:
    """Set the decision of every site."""
    low_precision = any(
        s.kind is Kind.WEIGHT and s.dtype in (torch.bfloat16, torch.float16) for s in sites
    )
    for site in sites:
        reason = _keep(site, config, low_precision)
        if reason is not None:
            site.decision = Decision(None, reason)
            continue
        assert site.problem is not None
        kernel, refusals = registry.choose(config.scheme, target, site.problem)
        if kernel is None:
            site.decision = Decision(None, refusals)
        else:
            site.decision = Decision(config.scheme, refusals or kernel.about, kernel)


def _keep(site: Site, config: QuantConfig, low_precision: bool) -> str | None:
    """Return why a site keeps its own precision, or None when it can be quantized."""
    if site.product.unsupported:
        return site.product.unsupported
    if site.kind is Kind.CONSTANT:
        return "both operands are parameters"
    pattern = first_match(config.ignored_layers, site.layer)
    if pattern is not None:
        return f"ignored by {pattern!r}"
    if site.kind is Kind.ACTIVATION and not config.matmul:
        computed = site.spelling == "linear"
        what = "its weight is computed in the graph" if computed else "two activations"
        return f"{what} (option 'matmul': True quantizes both operands)"
    if site.dtype not in DTYPES:
        return f"dtype {str(site.dtype).removeprefix('torch.')} is not quantized"
    if site.dtype is torch.float32 and low_precision:
        return "kept in float32 by the model, beside layers of lower precision"
    if expression.changed_in_graph(site.product.b.node) and site.kind is Kind.WEIGHT:
        return "the graph changes its weight in place"
    return _too_small(site, config.min_features)


def _too_small(site: Site, min_features: int) -> str | None:
    problem = site.problem
    assert problem is not None
    for name, size in (("K", problem.K), ("N", problem.N)):
        if not isinstance(size, int):
            # A symbolic size occurs only between activations; it is not compared, because that
            # would tie the compiled graph to the answer.
            continue
        if size < 1:
            return f"{name} = {size}: empty"
        if size < min_features:
            return f"{name} = {size} is under min_features = {min_features}"
    return None
