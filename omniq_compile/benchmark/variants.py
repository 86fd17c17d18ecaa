"""What a benchmark compares: one row a variant, from a model to what is called."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from omniq_compile.benchmark.linears import linear_calls
from omniq_compile.benchmark.result import BASELINE, BenchConfig
from omniq_compile.lowering.errors import OptionError, unknown
from omniq_compile.passes.option_checks import METHODS_OF
from omniq_compile.quantize_weights import quantize_

Inputs = dict[str, Any]

# The settings of Inductor that torchao recommends, and would set for whatever is compiled after it
# in the process, omniq too: its `recommended_inductor_config_setter`, from 0.14 to 0.18 the same.
TORCHAO_SETTINGS: dict[str, Any] = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
    "fx_graph_cache": True,
    "triton.unique_kernel_names": True,
}
SETTINGS_NOTE = (
    "torchao is compiled with the settings of Inductor that it recommends, such as "
    "coordinate_descent_tuning, and nothing else is"
)

# With it a first call on a GPU takes minutes: it compiles and times each kernel in many shapes.
TUNING = "coordinate_descent_tuning"
UNTUNED_NOTE = f"torchao untuned is torchao without {TUNING}, with which a first call takes minutes"

# `torch._int_mm`, which torchao's int8 calls however many rows there are, takes no fewer on CUDA.
FEWEST_ROWS = {"cuda": 17}
ROWS_NOTE = (
    "on a GPU torchao int8 leaves linears of up to 16 rows, such as those of the timestep, in "
    "BF16: torch._int_mm takes no fewer than 17 there"
)

DTYPE_NOTE = (
    "torchao fp8 by row takes no weights but those in BF16: it leaves layers that diffusers keeps "
    "in float32, such as those of Wan's timestep, as they are"
)


@dataclass(frozen=True)
class Variant:
    """A name, and how to turn a model, which it may change, and its inputs into what is called.

    ``options`` are omniq's, None for any other variant. ``notes`` say what its figures depend on.
    """

    name: str
    build: Callable[[nn.Module, Inputs], Callable[..., Any]]
    options: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def default_variants(config: BenchConfig) -> tuple[list[Variant], list[str]]:
    """Return the variants that ``config`` asks for, and a note for each that is not installed."""
    variants = [Variant("eager", lambda model, inputs: model)] if config.eager else []
    variants.append(Variant(BASELINE, _inductor))
    variants.append(Variant(f"omniq {config.method}", partial(_bound, options=_of(config.method))))
    notes = []
    if config.torchao and importlib.util.find_spec("torchao"):
        variants.append(TORCHAO_INT8)
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
        *(Variant(name, partial(_stored, options=o), o) for name, o in omniq.items()),
        *TORCHAO,
    ]


def named(variants: list[Variant], names: list[str]) -> list[Variant]:
    """Return the variants of these names, in their own order.

    Raises:
        OptionError: no variant has one of the names.
    """
    known = [variant.name for variant in variants]
    for name in names:
        if name not in known:
            raise OptionError(unknown("variant", name, known))
    return [variant for variant in variants if variant.name in names]


def _of(method: str) -> dict[str, Any]:
    options: dict[str, Any] = {"method": method}
    if method.lower().replace("-", "_") in METHODS_OF["num_bf16_fallback_layers"]:
        # What is measured is the method, not how many of a few blocks are left out.
        options["num_bf16_fallback_layers"] = 0
    return options


def _inductor(model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(model)
    return compiled


def _bound(model: nn.Module, inputs: Inputs, options: dict[str, Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(model, backend="omniq", options=options)
    return compiled


def _stored(model: nn.Module, inputs: Inputs, options: dict[str, Any]) -> Callable[..., Any]:
    quantize_(model, options)
    return _bound(model, inputs, options)


def _torchao_int8(model: nn.Module, inputs: Inputs, tuned: bool) -> Callable[..., Any]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    device = next(model.parameters()).device.type
    few = {
        linear
        for linear, rows in linear_calls(model, lambda: model(**inputs))
        if rows < FEWEST_ROWS.get(device, 1)
    }
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    return _torchao(model, config, few, tuned)


def _torchao_fp8(model: nn.Module, inputs: Inputs, tuned: bool) -> Callable[..., Any]:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )
    linears = (m for m in model.modules() if isinstance(m, nn.Linear))
    others = {linear for linear in linears if linear.weight.dtype is not torch.bfloat16}
    return _torchao(model, config, others, tuned)


def _torchao(
    model: nn.Module, config: Any, left_out: set[nn.Linear], tuned: bool
) -> Callable[..., Any]:
    from torchao.quantization import quantize_ as torchao_quantize_

    def taken(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module not in left_out

    torchao_quantize_(model, config, filter_fn=taken)
    settings = TORCHAO_SETTINGS | ({} if tuned else {TUNING: False})
    compiled: Callable[..., Any] = torch.compile(model, options=settings)
    return compiled


def _torchao_variant(name: str, build: Any, *notes: str, tuned: bool = True) -> Variant:
    notes = (SETTINGS_NOTE, *notes, *(() if tuned else (UNTUNED_NOTE,)))
    return Variant(name, partial(build, tuned=tuned), notes=notes)


TORCHAO_INT8 = _torchao_variant("torchao int8", _torchao_int8, ROWS_NOTE)
TORCHAO_FP8 = _torchao_variant("torchao fp8", _torchao_fp8, DTYPE_NOTE)
TORCHAO_INT8_UNTUNED = _torchao_variant(
    "torchao int8 untuned", _torchao_int8, ROWS_NOTE, tuned=False
)
TORCHAO_FP8_UNTUNED = _torchao_variant("torchao fp8 untuned", _torchao_fp8, DTYPE_NOTE, tuned=False)

# Those that take minutes last.
TORCHAO = (TORCHAO_FP8_UNTUNED, TORCHAO_INT8_UNTUNED, TORCHAO_FP8, TORCHAO_INT8)
