"""Which linear layers of a model are quantized, known from the model alone, without tracing it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from omniq_compile.compiling.all_kept import commonest, what_to_change
from omniq_compile.lowering import registry
from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.lowering.target import Target, detect, detectable
from omniq_compile.lowering.tensor_of_parts import foreign_kind
from omniq_compile.model_blocks import module_blocks
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.layer_names import layer_name
from omniq_compile.passes.policy import (
    DTYPES,
    FLOAT32_REASON,
    ignored_reason,
    leading_reason,
    option_of,
    too_small,
)
from omniq_compile.reports.display import to_text

# How every warning of it is worded, by which commands tell it from others.
NOTHING = "nothing was quantized"


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one linear layer.

    Attributes:
        layer: its dotted name.
        shape: of its weight, ``[N, K]``.
        dtype: of its weight.
        method: None when it keeps its own precision.
        reason: why.
        nbytes_before, nbytes_after: of its weight.
    """

    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    method: str | None
    reason: str
    nbytes_before: int
    nbytes_after: int


class LayerPlans(list[LayerPlan]):
    """The plans of all linear layers of a model; printed, a table of them."""

    def __repr__(self) -> str:
        """Say in one line what becomes of the layers: a model has hundreds."""
        method = next((row.method for row in self if row.method is not None), None)
        if method is None:
            return f"<{len(self)} linear layers, none quantized: {why_kept(self)}>"
        return f"<{describe(self, method)}>"

    def __str__(self) -> str:
        """Return a table of one line a layer."""
        table = Table(box=None, pad_edge=False)
        for name in ("layer", "N x K", "dtype", "decision", "bytes before", "after", "reason"):
            numbers = name in ("bytes before", "after")
            table.add_column(name, justify="right" if numbers else "left")
        for row in self:
            sizes = (f"{size:,}" for size in (row.nbytes_before, row.nbytes_after))
            shape, dtype = " x ".join(map(str, row.shape)), str(row.dtype).removeprefix("torch.")
            cells = (row.layer, shape, dtype, row.method or "kept", *sizes, row.reason)
            table.add_row(*map(escape, cells))
        return to_text(table)


def plan_layers(model: nn.Module, config: QuantConfig) -> LayerPlans:
    """Decide every ``nn.Linear`` of a model, which may be on the meta device.

    The leading blocks are those that the model defines first. Layers that hold one weight together
    are all quantized or none.

    Raises:
        OptionError: ``num_bf16_fallback_layers`` for a model without repeated blocks.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module._parameters.get("weight") is not None
    }
    dtypes = {module.weight.dtype for module in linears.values()}
    low_precision = bool(dtypes & {torch.bfloat16, torch.float16})
    leading = _leading(model, config)
    shared = _shared_with_others(model)
    names_of = layer_names(model)
    reasons: dict[str, str | None] = {}
    by_weight: dict[int, list[str]] = {}
    for name, module in linears.items():
        reasons[name] = (
            shared.get(id(module.weight))
            or next(filter(None, (ignored_reason(config, n) for n in names_of[module])), None)
            or (leading_reason(config) if name.startswith(leading) else None)
            or _keep(module.weight, config, low_precision)
        )
        by_weight.setdefault(id(module.weight), []).append(name)
    for names in by_weight.values():
        kept = next((n for n in names if reasons[n]), None)
        for name in names:
            if kept and not reasons[name]:
                reasons[name] = f"it shares its weight with {kept!r}, which is kept"
    return LayerPlans(_row(n, linears[n].weight, reasons[n], config) for n in linears)


def layer_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the names that each module has as a layer: it may stand in several places."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for place, module in model.named_modules(remove_duplicate=False):
        names[module].append(layer_name([], place))
    return names


def _leading(model: nn.Module, config: QuantConfig) -> tuple[str, ...]:
    if not config.num_bf16_fallback_layers:
        return ()
    blocks = module_blocks(model)
    if not blocks:
        raise OptionError(
            f"num_bf16_fallback_layers = {config.num_bf16_fallback_layers} keeps the leading "
            f"blocks in BF16, and {type(model).__name__} has no repeated blocks. "
            "Set 'num_bf16_fallback_layers': 0."
        )
    return tuple(f"{name}." for name in list(blocks)[: config.num_bf16_fallback_layers])


def _shared_with_others(model: nn.Module) -> dict[int, str]:
    """Return the parameters that modules other than linears hold, with that as a reason."""
    return {
        id(parameter): f"{type(module).__name__} {name!r} uses its weight too"
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    }


def _keep(weight: torch.Tensor, config: QuantConfig, low_precision: bool) -> str | None:
    if isinstance(weight, QuantizedTensor):
        return f"quantized already, as {weight.format}"
    if kind := foreign_kind(weight):
        return f"its weight is a {kind}, whose values other tensors hold"
    if weight.dtype not in DTYPES:
        return f"dtype {str(weight.dtype).removeprefix('torch.')} is not quantized"
    if weight.dtype is torch.float32 and low_precision:
        return FLOAT32_REASON
    N, K = weight.shape
    return too_small(K, N, config.min_features) or _no_kernel(weight, config)


def _no_kernel(weight: torch.Tensor, config: QuantConfig) -> str | None:
    """Return why no kernel of the weight's device takes it, where the device is known."""
    target = _target(weight, config)
    if target is None:
        return None
    N, K = weight.shape
    # M is not known; a transformer has many tokens.
    problem = registry.Problem(1 << 10, K, N, 2, 2, weight.dtype)
    kernel, refusals = registry.choose(config.scheme, target, problem)
    return None if kernel else refusals


def _target(weight: torch.Tensor, config: QuantConfig) -> Target | None:
    if config.target is not None:
        return config.target
    device = weight.device
    return detect(device) if detectable(device) else None


def _row(name: str, weight: torch.Tensor, reason: str | None, config: QuantConfig) -> LayerPlan:
    N, K = weight.shape
    before = N * K * weight.dtype.itemsize
    after = before
    if isinstance(weight, QuantizedTensor):
        after = weight.nbytes
    elif reason is None:
        after = get_format(config.scheme.weight).nbytes(N, K)
    return LayerPlan(
        layer=name,
        shape=(N, K),
        dtype=weight.dtype,
        method=None if reason else config.method,
        reason=reason or f"quantized to {config.scheme.weight}",
        nbytes_before=before,
        nbytes_after=after,
    )


def count_quantized(model: nn.Module) -> int:
    """Return how many weights of a model are stored quantized."""
    return sum(isinstance(parameter, QuantizedTensor) for parameter in model.parameters())


def plan_of_quantized(model: nn.Module, config: QuantConfig) -> list[LayerPlan]:
    """Return what became of every ``nn.Linear`` of a model whose weights are quantized already."""
    return [
        replace(row, method=config.method)
        if isinstance(model.get_submodule(row.layer).weight, QuantizedTensor)
        else row
        for row in plan_layers(model, config)
    ]


def why_kept(rows: Sequence[LayerPlan]) -> str:
    """Word why layers keep their own precision: each reason once, the commonest first."""
    reasons = Counter(row.reason for row in rows if row.method is None)
    if not reasons:
        return "there is no linear layer"
    return commonest(reasons)


def describe(rows: Sequence[LayerPlan], method: str) -> str:
    """Word a plan in one line: layers quantized and kept, weight bytes before and after."""
    new = sum(row.method is not None for row in rows)
    old = sum(row.method is None and row.nbytes_after < row.nbytes_before for row in rows)
    before = sum(row.nbytes_before for row in rows)
    after = sum(row.nbytes_after for row in rows)
    return (
        f"{new} linear layers to {method}, "
        + (f"{old} quantized already, " if old else "")
        + f"{len(rows) - new - old} kept; weights {before / 1e6:.1f} -> {after / 1e6:.1f} MB"
    )


def nothing_quantized(rows: Sequence[LayerPlan], model: str, config: QuantConfig) -> str:
    """Word a warning for a plan that leaves every layer as it is: the commonest reasons, and which
    options to change where it is by options.
    """
    if not rows:
        return f"{NOTHING}: {model} has no linear layers"
    options = {option_of(row.reason, row.shape[1], row.shape[0], config) for row in rows}
    return (
        f"{NOTHING}: all {len(rows)} linear layers of {model} are kept "
        f"({why_kept(rows)}){what_to_change(options)}"
    )
