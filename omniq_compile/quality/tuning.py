"""Finds the smallest set of layers to keep in BF16: measure each, search, and prove it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from omniq_compile.lowering.errors import OmniqError
from omniq_compile.memory import state_bytes
from omniq_compile.passes.config import QuantConfig
from omniq_compile.pipelines.components import PipelineQuantConfig
from omniq_compile.quality.compare_result import as_given
from omniq_compile.quality.comparison import (
    Setting,
    compile_pipeline,
    load_pipeline,
    models_of,
    pictures_in,
)
from omniq_compile.quality.generation import generate, release
from omniq_compile.quality.layer_units import (
    Layer,
    as_patterns,
    count_policies,
    path_of_keeping,
    quantized_layers,
)
from omniq_compile.quality.metrics import psnr
from omniq_compile.quality.recorded_calls import Call, recording
from omniq_compile.quality.sensitivity import layer_errors
from omniq_compile.quality.switches import Switches
from omniq_compile.quality.tune_goal import Goal, check_bytes, check_goal
from omniq_compile.quality.tune_state import TuneState, name_of_set

# A set is also tried without each of this many of its layers, those that gain least for a byte.
MOST_PRUNED = 16

Kept = frozenset[str]
OnWork = Callable[[str], None]


@dataclass
class Tuned:
    """What was found.

    Attributes:
        kept: keys of the layers that stay in BF16.
        quantization: what to load and compile with, as `build_quant_config` takes it.
        seed_psnr: of every seed, by real generation with what ``quantization`` says.
        nbytes: of the weights of the quantized components.
        nbytes_all_quantized, nbytes_bf16: likewise, of the two ends.
        points: ``(bytes, lowest PSNR of the seeds)`` of every set that was generated with.
        layers: what each layer's quantization alone costs.
    """

    kept: Kept
    quantization: dict[str, Any]
    seed_psnr: list[float]
    nbytes: int
    nbytes_all_quantized: int
    nbytes_bf16: int
    points: list[tuple[int, float]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)


class _Subject:
    """A pipeline in BF16 whose layers can be quantized for a while, and its reference pictures."""

    def __init__(self, setting: Setting, work: Path, on_work: OnWork) -> None:
        self.setting, self.work = setting, work
        on_work("loading in BF16")
        self.pipe = load_pipeline(setting, None)
        models = models_of(self.pipe)
        self.configs: dict[str, QuantConfig] = {}
        for name in models:
            options = setting.config.options_for(name)
            if options is not None:
                self.configs[name] = QuantConfig.from_options(options)
        self.layers = [
            layer
            for name, config in self.configs.items()
            for layer in quantized_layers(name, models[name], config)
        ]
        self.nbytes_bf16 = sum(state_bytes(models[name]) for name in self.configs)
        self.switches = {n: Switches(models[n], config) for n, config in self.configs.items()}
        self.calls: list[Call] = []

    def make_references(self, most_calls: int, on_work: OnWork) -> None:
        """Generate with BF16, and record calls of each model."""
        models, setting = models_of(self.pipe), self.setting
        with recording([models[name] for name in self.configs], most_calls) as self.calls:
            for seed in setting.seeds:
                on_work(f"BF16, seed {seed}")
                made = generate(self.pipe, setting.call, seed, keep_latents=False)
                save_file(
                    {"pictures": np.ascontiguousarray(made.pictures)},
                    self.work / f"bf16_{seed}.safetensors",
                )

    def nbytes(self, kept: Collection[str]) -> int:
        """Return the bytes of the components' weights when some layers are kept."""
        saved = sum(layer.extra_bytes for layer in self.layers if layer.key not in kept)
        return self.nbytes_bf16 - saved

    def quantized(self, keys: Collection[str]) -> ExitStack:
        """Quantize layers inside, and leave the others."""
        stack = ExitStack()
        for component, switches in self.switches.items():
            names = [x.name for x in self.layers if x.component == component and x.key in keys]
            stack.enter_context(switches.on(names))
        return stack

    def error(self, layers: Sequence[Layer]) -> float:
        """Return the mean error of the recorded calls with some layers quantized."""
        with self.quantized({layer.key for layer in layers}):
            return sum(call.error() for call in self.calls) / len(self.calls)

    def seed_psnr(self, kept: Collection[str]) -> list[float]:
        """Generate with all layers quantized but some; returns each seed's PSNR."""
        with self.quantized({layer.key for layer in self.layers if layer.key not in kept}):
            return generated_psnr(self.pipe, self.setting, self.work)


def generated_psnr(pipe: Any, setting: Setting, work: Path) -> list[float]:
    """Generate every seed; returns the PSNR of its pictures to the reference's, as one."""
    values = []
    for seed in setting.seeds:
        made = generate(pipe, setting.call, seed, keep_latents=False)
        finite = bool(np.isfinite(made.pictures).all())
        value = psnr(pictures_in(work, "bf16", seed), made.pictures) if finite else -math.inf
        values.append(value)
    return values


@dataclass
class _Search:
    """The sets of kept layers that are considered, and what was measured of them."""

    subject: _Subject
    state: TuneState
    on_work: OnWork
    errors: Mapping[str, float]
    path: list[Kept]
    most_policies: int
    points: dict[Kept, float] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, subject: _Subject, state: TuneState, on_work: OnWork, most_measurements: int
    ) -> _Search:
        """Measure the layers, and order them."""

        def measure(name: str, layers: Sequence[Layer]) -> float:
            values = state.get(name)
            if values is None:
                on_work(name)
                values = [subject.error(layers)]
                state.put(name, values)
            return values[0]

        errors = layer_errors(subject.layers, measure, most_measurements)
        # Of blocks with a graph break `omniq_compile.compile` refuses more, and each is a compile.
        most_policies = torch._dynamo.config.recompile_limit
        path = path_of_keeping(subject.layers, errors, most_policies)
        return cls(subject, state, on_work, errors, path, most_policies)

    def candidates(self, goal: Goal) -> list[Kept]:
        """Return the set found, and larger ones in case it does not hold when it is verified."""
        if goal.psnr is not None:
            return self._for_quality(goal.psnr)
        assert goal.max_bytes is not None
        return [self._for_bytes(goal.max_bytes)]

    def _fits(self, kept: Kept) -> bool:
        return count_policies(self.subject.layers, kept) <= self.most_policies

    def quality(self, kept: Kept) -> float:
        """Return the lowest PSNR of any seed, by generating."""
        if len(kept) == len(self.subject.layers):
            return math.inf
        name = f"generation {name_of_set(kept)}"
        values = self.state.get(name)
        if values is None:
            self.on_work(f"generating with {len(kept)} of {len(self.subject.layers)} layers kept")
            values = self.subject.seed_psnr(kept)
            self.state.put(name, values)
        self.points[kept] = min(values)
        return min(values)

    def density(self, key: str) -> float:
        """Return the error that keeping a layer takes off, for a byte."""
        (layer,) = (x for x in self.subject.layers if x.key == key)
        return self.errors[key] / max(1, layer.extra_bytes)

    def _for_quality(self, target: float) -> list[Kept]:
        """Return the smallest set found that reaches a PSNR, and larger ones.

        The path is halved until its first set that reaches the target; then the layers that gain
        least for a byte are tried without.
        """
        low, high = -1, len(self.path) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.quality(self.path[middle]) >= target:
                high = middle
            else:
                low = middle
        kept = self.path[high]
        for key in sorted(kept, key=lambda k: (self.density(k), k))[:MOST_PRUNED]:
            smaller = kept - {key}
            if self._fits(smaller) and self.quality(smaller) >= target:
                kept = smaller
        return [kept, *(larger for larger in self.path[high:] if kept < larger)]

    def _for_bytes(self, limit: int) -> Kept:
        """Return the set of the highest PSNR found within a number of bytes."""
        nbytes = self.subject.nbytes
        prefix = max((p for p in self.path if nbytes(p) <= limit), key=len)
        filled = prefix
        for key in sorted(self.errors, key=lambda k: (-self.density(k), k)):
            larger = filled | {key}
            if nbytes(larger) <= limit and self._fits(larger):
                filled = larger
        return max(dict.fromkeys((filled, prefix)), key=self.quality)

    def draw_curve(self, count: int) -> None:
        """Measure some sets along the path, for the plot."""
        for place in np.linspace(0, len(self.path) - 1, count).round().astype(int):
            self.quality(self.path[place])


def tune(
    setting: Setting,
    goal: Goal,
    state: TuneState,
    work: Path,
    on_work: OnWork,
    *,
    most_measurements: int = 400,
    most_calls: int = 8,
    curve: int = 6,
) -> Tuned:
    """Find the smallest set of layers to keep.

    Each layer's effect is measured on recorded calls of the BF16 pipeline's own trajectories,
    sets of layers by generating, both with `Switches`. The set that is returned was then loaded
    and compiled anew as a user would, after the BF16 pipeline is freed, and generated with.

    Args:
        setting: what to generate; its config is where layers are kept in.
        goal: what to reach.
        state: measurements of earlier runs, and where new ones go.
        work: a folder for the reference pictures.
        on_work: told what is measured next.
        most_measurements: see `layer_errors`.
        most_calls: of each model, to measure a layer on.
        curve: sets along the path that are generated with for the plot.

    Raises:
        OptionError: nothing to tune, or a goal that cannot be reached.
    """
    check_goal(setting, goal)
    release(setting.device)
    subject = _Subject(setting, work, on_work)
    if goal.max_bytes is not None:
        check_bytes(goal.max_bytes, subject.nbytes(()), subject.nbytes_bf16)
    subject.make_references(most_calls, on_work)
    search = _Search.begin(subject, state, on_work, most_measurements)
    candidates = search.candidates(goal)
    search.draw_curve(curve)
    layers, components = subject.layers, list(subject.configs)
    sizes = {kept: subject.nbytes(kept) for kept in (*candidates, *search.points, frozenset())}
    points, errors, nbytes_bf16 = search.points, search.errors, subject.nbytes_bf16
    # What is verified is loaded anew, and the two are never in memory together.
    del subject, search
    release(setting.device)
    for kept in candidates:
        if goal.psnr is not None and len(kept) == len(layers):
            continue  # which is the reference
        config = with_kept(setting.config, components, layers, kept)
        values = _verified(setting, config, components, kept, state, work, on_work)
        points[kept] = min(values)
        if goal.psnr is None or min(values) >= goal.psnr:
            break
    else:
        raise OmniqError(
            f"no set that leaves a layer quantized was found to reach {goal.psnr:g} dB; the best "
            f"measured has {max(points.values(), default=-math.inf):.2f} dB."
        )
    return Tuned(
        kept=kept,
        quantization=as_given(config),
        seed_psnr=values,
        nbytes=sizes[kept],
        nbytes_all_quantized=sizes[frozenset()],
        nbytes_bf16=nbytes_bf16,
        points=sorted((sizes[k], quality) for k, quality in points.items()),
        layers=[
            {
                "layer": layer.key,
                "error": errors[layer.key],
                "bytes_to_keep": layer.extra_bytes,
                "kept": layer.key in kept,
            }
            for layer in layers
        ],
    )


def with_kept(
    config: PipelineQuantConfig, components: Sequence[str], layers: Sequence[Layer], kept: Kept
) -> PipelineQuantConfig:
    """Return the config with the kept layers ignored, as patterns."""
    changed: dict[str, Any] = {}
    for component in components:
        options = config.options_for(component)
        assert options is not None
        inside = [layer for layer in layers if layer.component == component]
        ignored = [*options.get("ignored_layers", ()), *as_patterns(inside, kept)]
        changed[component] = {**options, "ignored_layers": ignored}
    if config.everywhere is not None and len(components) == 1:
        return PipelineQuantConfig(everywhere=changed[components[0]])
    return PipelineQuantConfig(components={**config.components, **changed})


def generate_anew(
    setting: Setting, config: PipelineQuantConfig, components: Sequence[str], work: Path
) -> tuple[list[float], int]:
    """Load, compile and generate as a user would, and free it.

    Returns:
        Each seed's PSNR to the reference pictures in ``work``, and the bytes of the components.
    """
    pipe = load_pipeline(setting, config)
    nbytes = sum(state_bytes(models_of(pipe)[name]) for name in components)
    compile_pipeline(pipe, config, reference=False)
    values = generated_psnr(pipe, setting, work)
    del pipe
    release(setting.device)
    return values, nbytes


def _verified(
    setting: Setting,
    config: PipelineQuantConfig,
    components: Sequence[str],
    kept: Kept,
    state: TuneState,
    work: Path,
    on_work: OnWork,
) -> list[float]:
    """Return each seed's PSNR when the pipeline is loaded and compiled anew."""
    name = f"verified {name_of_set(kept)}"
    values = state.get(name)
    if values is None:
        on_work(f"verifying with {len(kept)} layers kept, loaded and compiled anew")
        values, _ = generate_anew(setting, config, components, work)
        state.put(name, values)
    return values
