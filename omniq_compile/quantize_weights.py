"""`quantize` one weight, or `quantize_` a model's linear layers in place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from omniq_compile.checkpoints.recorded_options import (
    difference,
    quantization_config,
    quantization_record,
)
from omniq_compile.compiling.unmatched import warn_unmatched_in
from omniq_compile.given_model import check_model
from omniq_compile.layer_plan import (
    LayerPlan,
    LayerPlans,
    describe,
    layer_names,
    nothing_quantized,
    plan_layers,
)
from omniq_compile.lowering.errors import OptionError, WeightError, unknown
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.layer_names import layer_name
from omniq_compile.passes.patterns import first_match

logger = logging.getLogger("omniq")

# The options that change how one weight is stored.
WEIGHT_OPTIONS = ("mxfp4_scale_alg", "weight_block_size")


def quantize(weight: torch.Tensor, method: str, **options: Any) -> QuantizedTensor:
    """Quantize one weight.

    Args:
        weight: ``[..., N, K]``, floating, with at least one element.
        method: ``int8``, ``fp8``, ``mxfp8``, ``mxfp4`` or ``mxfp4_dualscale``; case and hyphens
            do not matter.
        options: ``mxfp4_scale_alg`` for the mxfp4 methods, ``weight_block_size`` for fp8.

    Raises:
        OptionError: an unknown method or option.
        WeightError: the weight is not a floating matrix, is empty, or holds NaN or Inf.
    """
    for name in options:
        if name not in WEIGHT_OPTIONS:
            raise OptionError(unknown("option of quantize", name, WEIGHT_OPTIONS))
    config = QuantConfig.from_options({"method": method, **options})
    if isinstance(weight, QuantizedTensor):
        raise WeightError(
            f"the weight is quantized already, to {weight.method}. Give weight.dequantize() to "
            "quantize its values again."
        )
    return QuantizedTensor.from_weight(weight, config.scheme.weight, config.method)


def quantize_(model: nn.Module, options: Mapping[str, Any] | QuantConfig) -> LayerPlans:
    """Quantize the linear layers of a model in place, and free each weight as it goes.

    The model then works as before: eager use dequantizes a weight each time, and
    ``torch.compile(model, backend="omniq", options=options)`` multiplies in the method's
    precision. Layers are chosen as for compiling, but that a model alone does not show the order
    in which its blocks run: ``num_bf16_fallback_layers`` counts those that it defines first.

    Args:
        model: any module, on any device.
        options: see `QuantConfig`.

    Returns:
        A list with one `LayerPlan` a linear layer: what became of it, and why; printed, a table.

    Raises:
        OptionError: no module, unknown options, a policy that the model has no blocks for, or a
            model that was quantized with other options.
        WeightError: a weight holds NaN or Inf; the message names its layer. Layers before it are
            quantized already.
    """
    check_model(model, "quantize_")
    config = QuantConfig.from_options(options)
    warn_unmatched_in(model, config)
    rows = plan_layers(model, config)
    _check_quantized_before(model, rows, config)
    layers: dict[int, list[Any]] = {}  # by weight, which several may share
    names: dict[int, str] = {}
    for row in rows:
        if row.method is not None:
            layer: Any = model.get_submodule(row.layer)
            layers.setdefault(id(layer.weight), []).append(layer)
            names.setdefault(id(layer.weight), layer_name([], row.layer))
    for key, sharing in layers.items():
        parameter = quantized_parameter(names[key], sharing[0].weight, config)
        for layer in sharing:
            layer._parameters["weight"] = parameter
    if layers and hasattr(model, "save_pretrained"):
        from omniq_compile.checkpoints.saving import make_savable  # needs diffusers

        make_savable(model, quantization_config(config))
    if layers or any(isinstance(p, QuantizedTensor) for p in model.parameters()):
        logger.info("quantize_: %s", describe(rows, config.method))
    else:
        logger.warning("quantize_: %s", nothing_quantized(rows, type(model).__name__, config))
    return rows


def _check_quantized_before(model: nn.Module, rows: list[LayerPlan], config: QuantConfig) -> None:
    """Refuse a model that was quantized with other options: one record describes all of it."""
    record = quantization_record(model)
    differs = "" if record is None else difference(record, config)
    if differs:
        raise OptionError(
            f"this {type(model).__name__} is {differs}. Quantize the original model, or call "
            "its dequantize() first, which keeps the rounding of its weights."
        )
    names_of = layer_names(model)
    for row in rows:
        layer: Any = model.get_submodule(row.layer)
        weight, names = layer.weight, names_of[layer]
        if not isinstance(weight, QuantizedTensor) or weight.format == config.scheme.weight:
            continue
        if not any(first_match(config.ignored_layers, name) for name in names):
            raise OptionError(
                f"the weight of {names[0]!r} is quantized already, as {weight.format}, and "
                f"these options ask for {config.scheme.weight}. Quantize the original model, "
                f"or keep the layer with 'ignored_layers': [{names[0]!r}]."
            )


def quantized_parameter(layer: str, weight: torch.Tensor, config: QuantConfig) -> nn.Parameter:
    """Return the weight of a layer, quantized, as a parameter without gradients.

    Raises:
        WeightError: it cannot be quantized; the message names the layer.
    """
    try:
        tensor = QuantizedTensor.from_weight(weight, config.scheme.weight, config.method)
    except WeightError as error:
        raise WeightError(
            f"layer {layer!r}: {error} Check the checkpoint, or keep the layer with "
            f"'ignored_layers': [{layer!r}]."
        ) from error
    return nn.Parameter(tensor, requires_grad=False)
