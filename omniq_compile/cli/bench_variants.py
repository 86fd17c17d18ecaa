"""What a benchmark compares: one row a variant, from a model to what is called."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from omniq_compile.cli.bench_result import BASELINE, BenchConfig
from omniq_compile.passes.option_checks import METHODS_OF
from omniq_compile.quantize_weights import quantize_


@dataclass(frozen=True)
class Variant:
    """A name, and how to turn a model, which it may change, into what is called.

    ``options`` are omniq's, None for any other variant.
    """

    name: str
    build: Callable[[nn.Module], Callable[..., Any]]
    options: dict[str, Any] | None = None


def default_variants(config: BenchConfig) -> tuple[list[Variant], list[str]]:
    """Return the variants that ``config`` asks for, and a note for each that is not installed."""
    variants = [Variant("eager", lambda model: model)] if config.eager else []
    variants.append(Variant(BASELINE, _inductor))
    variants.append(Variant(f"omniq {config.method}", partial(_bound, options=_of(config.method))))
    notes = []
    if config.torchao and importlib.util.find_spec("torchao"):
        variants.append(Variant("torchao int8", _torchao_int8))
    elif config.torchao:
        notes.append("torchao is not installed, so it was left out: pip install torchao")
    return variants, notes


def suite_variants() -> list[Variant]:
    """Return every variant of a suite. omniq's store their weights quantized, as torchao's do."""
    omniq = {
        "omniq int8": _of("int8"),
        # Where omniq's own tiles were chosen well, this is no faster.
        "omniq int8 max_autotune": _of("int8") | {"inductor": {"max_autotune_gemm": True}},
        "omniq fp8": _of("fp8"),
        "omniq fp8 block-wise": _of("fp8") | {"weight_block_size": [128, 128]},
        "omniq mxfp8": _of("mxfp8"),
        "omniq mxfp4": _of("mxfp4"),
    }
    return [
        Variant(BASELINE, _inductor),
        Variant("torchao fp8", _torchao_fp8),
        Variant("torchao int8", _torchao_int8),
        *(Variant(name, partial(_stored, options=o), o) for name, o in omniq.items()),
    ]


def _of(method: str) -> dict[str, Any]:
    options: dict[str, Any] = {"method": method}
    if method.lower().replace("-", "_") in METHODS_OF["num_bf16_fallback_layers"]:
        # What is measured is the method, not how many of a few blocks are left out.
        options["num_bf16_fallback_layers"] = 0
    return options


def _inductor(model: nn.Module) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(model)
    return compiled


def _bound(model: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(model, backend="omniq", options=options)
    return compiled


def _stored(model: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    quantize_(model, options)
    return _bound(model, options)


def _torchao_int8(model: nn.Module) -> Callable[..., Any]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from torchao.quantization import quantize_ as torchao_quantize_

    torchao_quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return _inductor(model)


def _torchao_fp8(model: nn.Module) -> Callable[..., Any]:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
    from torchao.quantization import quantize_ as torchao_quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    torchao_quantize_(model, config)
    return _inductor(model)
