"""A pipeline in BF16 and quantized, one after the other, with the same seeds and arguments."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from omniq_compile.layer_plan import count_quantized, plan_layers, plan_of_quantized, why_kept
from omniq_compile.lowering.errors import OptionError
from omniq_compile.memory import peak_of_call, state_bytes
from omniq_compile.passes.config import QuantConfig
from omniq_compile.pipelines.call import check_call, compile_component, load_worded
from omniq_compile.pipelines.components import PipelineQuantConfig
from omniq_compile.pipelines.images import GivenImage, with_images
from omniq_compile.quality.generation import Generation, Pictures, generate, release, warm_up
from omniq_compile.quality.metrics import picture_metrics, relative_l2
from omniq_compile.quality.perceptual import Distance, load_lpips

# Called with "bf16" or "quantized", the seed's place, and the steps done of it; -1 when it ended.
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Setting:
    """What both sides of a comparison share.

    Attributes:
        folder: of a diffusers pipeline with weights that are not quantized.
        config: which components are quantized, and how.
        arguments: of the pipeline's call, as JSON can say them.
        seeds: one call each.
        device: to run on.
        loading: further arguments of ``from_pretrained``.
        images: for arguments of the call that take pictures.
    """

    folder: str
    config: PipelineQuantConfig
    arguments: Mapping[str, Any]
    seeds: Sequence[int]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    loading: Mapping[str, Any] = field(default_factory=dict, repr=False)  # with a token
    images: Sequence[GivenImage] = ()

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline's call, images among them."""
        return with_images(self.arguments, self.images)


@dataclass
class Side:
    """What one side cost.

    Attributes:
        first_call_seconds: of a short call that compiles everything, not counted below.
        seconds: of each seed's call.
        peak_bytes: the most memory that loading, compiling and generating added to what the
            process held before; None where the system cannot tell.
        weight_bytes: of all parameters and buffers of the pipeline.
        quantized_layers: weights that are stored quantized.
    """

    first_call_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    weight_bytes: int = 0
    quantized_layers: int = 0

    @property
    def median_seconds(self) -> float:
        """Of one call."""
        return statistics.median(self.seconds)


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        bf16, quantized: what each side cost.
        seeds: a row a seed: its metrics over all its pictures, ``trajectory`` (the relative L2
            distance of the latents after each step) and ``pictures`` (metrics of each).
        lpips_reason: why there is no LPIPS, or empty.
        trajectory_reason: why there are no trajectories, or empty.
    """

    bf16: Side = field(default_factory=Side)
    quantized: Side = field(default_factory=Side)
    seeds: list[dict[str, Any]] = field(default_factory=list)
    lpips_reason: str = ""
    trajectory_reason: str = ""


def compare(setting: Setting, work: Path, on_step: OnStep) -> Comparison:
    """Generate in BF16, free it, generate quantized, and compare.

    Both sides are compiled the same way; in BF16 every layer is kept, so that the compiler
    gets the graph as Dynamo traced it. Only one side is ever in memory: what BF16 made waits in
    ``work``.

    Args:
        setting: see there.
        work: an empty folder; ``pictures_in`` reads from it afterwards.
        on_step: told about every denoising step.

    Raises:
        OptionError: the config or the arguments do not fit the pipeline.
        CheckpointError: the folder cannot be loaded.
    """
    result = Comparison()
    _run(setting, None, result.bf16, work, on_step)
    _run(setting, setting.config, result.quantized, work, on_step)
    # Only now, as what metrics take of memory is no side's.
    size = pictures_in(work, "quantized", setting.seeds[0]).shape[1:3]
    distance, result.lpips_reason = load_lpips(size)
    result.seeds = [_seed_row(work, seed, distance) for seed in setting.seeds]
    if not any(row["trajectory"] for row in result.seeds):
        result.trajectory_reason = (
            "the pipeline's call takes no callback_on_step_end that is given latents"
        )
    return result


def _run(
    setting: Setting,
    config: PipelineQuantConfig | None,
    side: Side,
    work: Path,
    on_step: OnStep,
) -> None:
    """Load one side, generate every seed, keep what it made in ``work``, and free it."""
    name = "bf16" if config is None else "quantized"

    def run() -> None:
        pipe = load_pipeline(setting, config)
        side.weight_bytes = sum(map(state_bytes, models_of(pipe).values()))
        side.quantized_layers = sum(map(count_quantized, models_of(pipe).values()))
        compile_pipeline(pipe, setting.config, reference=config is None)
        side.first_call_seconds = warm_up(pipe, setting.call, setting.seeds[0])
        for place, seed in enumerate(setting.seeds):
            made = generate(pipe, setting.call, seed, lambda n, i=place: on_step(name, i, n))  # type: ignore[misc]
            on_step(name, place, -1)
            side.seconds.append(made.seconds)
            _save(work / f"{name}_{seed}.safetensors", made)

    release(setting.device)
    side.peak_bytes = peak_of_call(run, setting.device)
    release(setting.device)


def load_pipeline(setting: Setting, config: PipelineQuantConfig | None) -> Any:
    """Load the pipeline, in BF16 where there is no config, and check its call's arguments.

    Raises:
        OptionError: the arguments do not fit, or the BF16 pipeline is no reference for the
            setting's config.
    """
    pipe = load_worded(setting.folder, config, device=setting.device, **setting.loading)
    check_call(type(pipe), {**setting.call, "generator": None}, setting.config)
    if config is None:
        _check_reference(setting, models_of(pipe))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(setting.device)


def _check_reference(setting: Setting, models: Mapping[str, nn.Module]) -> None:
    """Find out before anything is generated that the two sides would not differ as they should.

    Raises:
        OptionError: the pipeline is quantized already, or the options quantize none of its layers,
            where equal pictures would say nothing of a method.
    """
    if any(map(count_quantized, models.values())):
        raise OptionError(
            f"{setting.folder} holds quantized weights, and the reference is the pipeline in BF16: "
            "give the folder it was quantized from."
        )
    for name, model in models.items():
        setting.config.check_parts(name, model)
    configs = {
        name: QuantConfig.from_options(options)
        for name in models
        if (options := setting.config.options_for(name)) is not None
    }
    # Products of activations belong to no layer.
    if any(config.matmul for config in configs.values()):
        return
    rows = [row for name, config in configs.items() for row in plan_layers(models[name], config)]
    if all(row.method is None for row in rows):
        why = why_kept(rows) if configs else f"they give no method to {', '.join(models)}"
        raise OptionError(
            f"these options quantize no layer of {setting.folder}, so there is nothing to "
            f"measure: {why}."
        )


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the components of a pipeline that have weights."""
    return {name: c for name, c in pipe.components.items() if isinstance(c, nn.Module)}


def compile_pipeline(pipe: Any, config: PipelineQuantConfig, *, reference: bool) -> None:
    """Compile the components that the config quantizes; for a reference, without quantizing."""
    for name, model in models_of(pipe).items():
        options = config.options_for(name)
        if options is None:
            continue
        checked = QuantConfig.from_options(options)
        if not checked.matmul and not any(row.method for row in plan_of_quantized(model, checked)):
            continue  # such as a VAE without linear layers
        if reference:
            checked = dataclasses.replace(
                checked,
                ignored_layers=(),
                w4a8_fallback_layers=(),
                w4a8_fallback_steps=(),
                num_bf16_fallback_layers=0,
                keep_all="the BF16 reference",
            )
        compile_component(model, checked)


def _save(file: Path, made: Generation) -> None:
    tensors = {"pictures": torch.from_numpy(np.ascontiguousarray(made.pictures))}
    tensors |= {f"latents.{i}": x.contiguous() for i, x in enumerate(made.latents)}
    save_file(tensors, file)


def pictures_in(work: Path, name: str, seed: int) -> Pictures:
    """Return the pictures of a seed, of side ``bf16`` or ``quantized``."""
    with safe_open(work / f"{name}_{seed}.safetensors", "np") as file:
        pictures: Pictures = file.get_tensor("pictures")
    return pictures


def _seed_row(work: Path, seed: int, lpips: Distance | None) -> dict[str, Any]:
    reference, made = (pictures_in(work, side, seed) for side in ("bf16", "quantized"))
    # Before pictures are paired, as it words shapes that differ.
    together = picture_metrics(reference, made)
    rows = []
    for index, (expected, picture) in enumerate(zip(reference, made, strict=True)):
        row = {"index": index, **picture_metrics(expected, picture)}
        row["lpips"] = lpips(expected, picture) if lpips else None
        rows.append(row)
    distances = [row["lpips"] for row in rows if row["lpips"] is not None]
    return {
        "seed": seed,
        **together,
        "lpips": float(np.mean(distances)) if distances else None,
        "trajectory": _trajectory(work, seed),
        "pictures": rows,
    }


def _trajectory(work: Path, seed: int) -> list[float]:
    with (
        safe_open(work / f"bf16_{seed}.safetensors", "pt") as bf16,
        safe_open(work / f"quantized_{seed}.safetensors", "pt") as quantized,
    ):
        steps = sum(name.startswith("latents.") for name in quantized.keys())  # noqa: SIM118
        pairs = (
            [file.get_tensor(f"latents.{step}").float().numpy() for file in (bf16, quantized)]
            for step in range(steps)
        )
        return [relative_l2(*pair) for pair in pairs]
