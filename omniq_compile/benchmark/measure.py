"""Measures compiled variants of one model side by side, in one process.

The variants take turns (A B C D A B C D ...), so that a machine that slows down slows all of them,
and each round gives a ratio of its own. Timed is the forward of the whole model under
``torch.no_grad()``, as diffusers pipelines call it, right after an untimed one of the same variant:
a denoising loop calls one model again and again, and finds caches and memory as it left them. A GPU
is timed over several forwards in a row: it starts on one while the host is asked for the next.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from omniq_compile.benchmark.machine import (
    captured,
    environment,
    synchronize,
    time_calls,
    to_device,
)
from omniq_compile.benchmark.result import DTYPES, BenchConfig, BenchResult, Measurement
from omniq_compile.benchmark.variants import Variant, default_variants
from omniq_compile.compiling import weights
from omniq_compile.memory import peak_of_call, peak_rss, state_bytes
from omniq_compile.models.random_models import make_inputs, random_model

# A model larger than this gets no float32 reference, which would take twice as much again.
FLOAT32_REFERENCE_BYTES = 8 << 30


@dataclass(frozen=True)
class _Subject:
    """What every variant is given, and what its output is compared with."""

    model: nn.Module
    inputs: dict[str, Any]
    device: torch.device
    exact: Tensor | None
    eager: Tensor


def run_bench(
    config: BenchConfig, console: Console, variants: list[Variant] | None = None
) -> BenchResult:
    """Measure ``variants``, by default those of `default_variants`.

    A variant that raises is recorded with its error, and the others go on. Sets PyTorch's number
    of threads where ``config.threads`` is given, and forgets what ``torch.compile`` has compiled.

    Raises:
        OmniqError: the config names a model or sizes that cannot be built.
    """
    notes: list[str] = []
    if variants is None:
        variants, notes = default_variants(config)
    notes += dict.fromkeys(note for variant in variants for note in variant.notes)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.compiler.reset()
    measurements = [Measurement(v.name) for v in variants]
    calls: dict[str, Callable[[], Any]] = {}
    graphs: dict[str, Callable[[], None]] = {}

    # Every variant compiles the same functions; past the limit PyTorch would run them eagerly.
    limits = {"recompile_limit": 8 * len(variants), "fail_on_recompile_limit_hit": True}
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(limits),
        Progress(console=console, transient=True) as progress,
    ):
        steps = 1 + len(variants) * (1 + config.rounds)
        task = progress.add_task("model and reference", total=steps)
        subject = _make_subject(config)
        if subject.exact is None:
            notes.append("no float32 reference: the model is too large for one")
        progress.advance(task)
        for m, variant in zip(measurements, variants, strict=True):
            progress.update(task, description=f"first call: {m.name}")
            _attempt(m, _first_calls, variant, subject, config.warmup, calls)
            if subject.device.type == "cuda":
                _attempt(m, _capture, calls, graphs)
            progress.advance(task)
        device = subject.device
        del subject
        before = weights.statistics()
        for number in range(config.rounds):
            progress.update(task, description=f"round {number + 1} of {config.rounds}")
            for m in measurements:
                _attempt(m, _timed_calls, calls, graphs, device, config)
                progress.advance(task)
        after = weights.statistics()

    count = config.rounds * (config.calls_before_timing + config.calls_per_timing)
    lookups = (after["lookups"] - before["lookups"]) / count
    if not lookups and any(m.name.startswith("omniq") and not m.error for m in measurements):
        notes.append("omniq looked up no quantized weight: nothing was rewritten")
    return BenchResult(
        config=config,
        environment=environment(config),
        measurements=measurements,
        lookups_per_call=lookups,
        lookup_seconds_per_call=(after["lookup_seconds"] - before["lookup_seconds"]) / count,
        peak_rss_bytes=max([peak_rss(), *(m.peak_rss_bytes or 0 for m in measurements)]),
        notes=notes,
    )


def first_call(config: BenchConfig, variant: Variant) -> None:
    """Compile a variant as `run_bench` would, for Inductor's cache.

    Raises:
        OmniqError: the config names a model or sizes that cannot be built.
    """
    with torch.no_grad():
        model, inputs = _model_and_inputs(config)
        variant.build(model, inputs)(**inputs)
        synchronize(torch.device(config.device))


def _make_subject(config: BenchConfig) -> _Subject:
    model, inputs = _model_and_inputs(config)
    exact = None
    if state_bytes(model) <= FLOAT32_REFERENCE_BYTES:
        inputs_float32 = tree_map_only(
            Tensor, lambda t: t.float() if t.is_floating_point() else t, inputs
        )
        exact = _flat(copy.deepcopy(model).float()(**inputs_float32))
    device = torch.device(config.device)
    return _Subject(model, inputs, device, exact, eager=_flat(model(**inputs)))


def _model_and_inputs(config: BenchConfig) -> tuple[nn.Module, dict[str, Any]]:
    dtype, device = DTYPES[config.dtype], torch.device(config.device)
    model = random_model(
        config.model, width=config.width, num_blocks=config.blocks, dtype=dtype, seed=config.seed
    )
    to_device(model, device)
    inputs = make_inputs(
        model,
        image_tokens=config.image_tokens,
        text_tokens=config.text_tokens,
        dtype=dtype,
        seed=config.seed,
    )
    return model, tree_map_only(Tensor, lambda t: t.to(device), inputs)


def _attempt(m: Measurement, step: Callable[..., None], *args: Any) -> None:
    if m.error is not None:
        return
    try:
        step(m, *args)
    # Whatever one variant raises is a result, to be reported beside the others.
    except Exception as error:
        m.error = f"{type(error).__name__}: {error}".strip()
        m.traceback = traceback.format_exc()


def _first_calls(
    m: Measurement,
    variant: Variant,
    subject: _Subject,
    warmup: int,
    calls: dict[str, Callable[[], Any]],
) -> None:
    model, inputs, device = copy.deepcopy(subject.model), subject.inputs, subject.device
    resident = weights.resident_bytes()
    synchronize(device)
    start = time.perf_counter()
    function = variant.build(model, inputs)
    output = function(**inputs)
    synchronize(device)
    m.first_call_seconds = time.perf_counter() - start
    m.weight_bytes = state_bytes(model)
    m.quantized_bytes = weights.resident_bytes() - resident
    y = _flat(output)
    m.error_to_eager = _relative_error(y, subject.eager)
    if subject.exact is not None:
        m.error_to_float32 = _relative_error(y, subject.exact)
    calls[m.name] = lambda: function(**inputs)
    m.peak_rss_bytes = peak_rss()
    del output, y
    for _ in range(warmup):
        m.peak_call_bytes = peak_of_call(calls[m.name], device)


def _capture(
    m: Measurement, calls: dict[str, Callable[[], Any]], graphs: dict[str, Callable[[], None]]
) -> None:
    try:
        graphs[m.name] = captured(calls[m.name])
    # What cannot be a graph is timed as it is.
    except Exception as error:
        m.graph_error = f"{type(error).__name__}: {error}".strip()


def _timed_calls(
    m: Measurement,
    calls: dict[str, Callable[[], Any]],
    graphs: dict[str, Callable[[], None]],
    device: torch.device,
    config: BenchConfig,
) -> None:
    for _ in range(config.calls_before_timing):
        calls[m.name]()
    timing = time_calls(calls[m.name], device, config.calls_per_timing)
    m.seconds.append(timing.seconds)
    if timing.host_seconds is not None:
        m.host_seconds.append(timing.host_seconds)
    if m.name in graphs:
        graphs[m.name]()
        timing = time_calls(graphs[m.name], device, config.calls_per_timing)
        m.graph_seconds.append(timing.seconds)


def _flat(output: Any) -> Tensor:
    """Return all tensors of an output as one float32 vector."""
    return torch.cat([t.float().flatten() for t in tree_leaves(output) if isinstance(t, Tensor)])


def _relative_error(y: Tensor, reference: Tensor) -> float:
    return float((y - reference).norm() / reference.norm())
