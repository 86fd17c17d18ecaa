"""A plan: what omniq will do to a model, from its configuration alone, without a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from omniq_compile.lowering.target import Target
from omniq_compile.model_blocks import module_blocks
from omniq_compile.passes import dynamo, policy
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.sites import Site
from omniq_compile.planning.folded_trace import folded_sites
from omniq_compile.planning.meta_run import run_on_meta
from omniq_compile.reports.summary import site_bytes


@dataclass(frozen=True)
class PlanRow:
    """Layers of one kind that are treated alike.

    Attributes:
        kind: the layers' name, with ``*`` for block numbers.
        count: how many sites they are.
        M, K, N: of each: ``[..., M, K]`` times ``[N, K]``.
        method: None where they keep their own precision.
        kernel: what they lower to, and None where they are kept.
        native: whether that kernel multiplies in the method's own precision.
        reason: why.
        flops: floating-point operations of all of them in one call of the model, two a
            multiply-add.
        bytes_before, bytes_after: of all their weights together, each weight counted once.
    """

    kind: str
    count: int
    M: int
    K: int
    N: int
    method: str | None
    kernel: str | None
    native: bool
    reason: str
    flops: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Plan:
    """What one compile will do.

    Attributes:
        rows: in the order the model runs their first layer.
        parameters: how many numbers the model holds.
        attention_flops, other_flops: of one call, beside the rows': attention, and convolutions
            and products that are no sites.
        weight_bytes_before, weight_bytes_after: of all parameters and buffers.
        activation_bytes: an estimate: tensors alive at once in an eager call in the model's own
            precision, without attention's score matrices. Compiled code fuses, and needs less;
            workspaces and the allocator's rounding come on top.
        decoded_bytes: the largest weight that a kernel decodes as a whole in a call, in float32.
    """

    rows: tuple[PlanRow, ...]
    parameters: int
    attention_flops: int
    other_flops: int
    weight_bytes_before: int
    weight_bytes_after: int
    activation_bytes: int
    decoded_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations of one call of the model."""
        return sum(row.flops for row in self.rows) + self.attention_flops + self.other_flops


def plan_model(
    model: nn.Module, inputs: Mapping[str, Any], config: QuantConfig, target: Target
) -> tuple[Plan, list[Site]]:
    """Plan for a model on the meta device; returns the plan, and its sites as decided.

    Args:
        model: without values, such as built under ``torch.device("meta")``.
        inputs: keyword arguments of one call, on the meta device.

    Raises:
        OmniqError: the model needs values to run.
        OptionError: ``num_bf16_fallback_layers`` for a model without repeated blocks.
    """
    blocks = module_blocks(model)
    run = run_on_meta(model, inputs, blocks)
    sites = folded_sites(model, inputs, blocks, run)
    policy.decide(sites, config, target)
    rows = _rows(sites)
    site_flops = sum(row.flops for row in rows)
    saved = sum(row.bytes_before - row.bytes_after for row in rows)
    before = _model_bytes(model)
    plan = Plan(
        rows=rows,
        parameters=sum(p.numel() for p in model.parameters()),
        attention_flops=run.attention_flops,
        other_flops=run.other_flops - site_flops,
        weight_bytes_before=before,
        weight_bytes_after=before - saved,
        activation_bytes=run.peak_bytes,
        decoded_bytes=_decoded_bytes(sites),
    )
    return plan, sites


def _rows(sites: Sequence[Site]) -> tuple[PlanRow, ...]:
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        problem, decision = site.problem, site.decision
        shape = (problem.M, problem.K, problem.N) if problem else (0, 0, 0)
        key = (_kind(site.layer), shape, decision.method, decision.kernel, decision.reason)
        groups.setdefault(key, []).append(site)
    counted: set[Any] = set()
    rows = []
    for (kind, (M, K, N), method, kernel, reason), members in groups.items():
        sizes = []
        for site in members:
            # Slices of one parameter, such as a fused qkv, share its name and not its bytes.
            weight = site.weight and (site.weight_name, site.weight.key)
            if weight and weight not in counted:
                counted.add(weight)
                sizes.append(site_bytes(site) or (0, 0))
        rows.append(
            PlanRow(
                kind=kind,
                count=len(members),
                M=M,
                K=K,
                N=N,
                method=method,
                kernel=kernel.name if kernel else None,
                native=bool(kernel and kernel.native),
                reason=reason,
                flops=sum(_flops(site) for site in members),
                bytes_before=sum(before for before, _ in sizes),
                bytes_after=sum(after for _, after in sizes),
            )
        )
    return tuple(rows)


def _kind(layer: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)|(?<=\.)\d+$", "*", layer, count=1) or "(the model itself)"


def _flops(site: Site) -> int:
    if site.problem is None:
        return 0
    return 2 * int(dynamo.value(site.node).numel() * site.problem.K)


def _elements(site: Site) -> int:
    return math.prod(dynamo.value(site.product.b.node).shape)


def _decoded_bytes(sites: Sequence[Site]) -> int:
    decoded = [
        _elements(site)
        for site in sites
        if site.decision.kernel is not None and site.decision.kernel.decodes_whole
    ]
    return 4 * max(decoded, default=0)


def _model_bytes(model: nn.Module) -> int:
    owned: dict[int, torch.Tensor] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(tensor.nbytes for tensor in owned.values())
