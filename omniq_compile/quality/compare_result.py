"""``result.json`` of a comparison: numbers that any JSON reader takes, and what they mean."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import omniq_compile
from omniq_compile.checkpoints.whole_file import written_whole
from omniq_compile.lowering.errors import OptionError
from omniq_compile.pipelines.components import PipelineQuantConfig
from omniq_compile.pipelines.images import by_argument
from omniq_compile.quality.comparison import Comparison, Setting, Side
from omniq_compile.quality.gate import Gate
from omniq_compile.strict_json import to_json

VERSION = 1


def as_json(
    setting: Setting, result: Comparison, gate: Gate, gate_name: str, failures: list[str]
) -> dict[str, Any]:
    """Return the content of ``result.json``; what was not measured is null, beside its reason."""
    return {
        "version": VERSION,
        "folder": setting.folder,
        "quantization": as_given(setting.config),
        "variant": setting.loading.get("variant"),
        "revision": setting.loading.get("revision"),
        "arguments": dict(setting.arguments),
        "images": by_argument(setting.images, lambda image: str(image.file)),
        "seeds": list(setting.seeds),
        "gate": {
            "name": gate_name,
            "thresholds": dataclasses.asdict(gate),
            "passed": not failures,
            "failures": failures,
        },
        "metrics": {
            name: _summary(result, name)
            for name in ("psnr", "ssim", "mae", "cosine", "relative_l2", "lpips")
        },
        "not_measured": {
            name: reason
            for name, reason in (
                ("lpips", result.lpips_reason),
                ("trajectory", result.trajectory_reason),
                ("ssim", "" if result.seeds[0]["ssim"] is not None else "pictures under 7 x 7"),
            )
            if reason
        },
        "bf16": _side(result.bf16),
        "quantized": _side(result.quantized),
        "per_seed": result.seeds,
        "environment": environment(setting.device),
    }


def as_given(config: PipelineQuantConfig) -> dict[str, Any]:
    """Return what a config says, as `build_quant_config` takes it."""
    return dict(config.everywhere) if config.everywhere is not None else dict(config.components)


def _summary(result: Comparison, name: str) -> dict[str, float | None]:
    """Return the mean over seeds, and the worst of them."""
    values = [row[name] for row in result.seeds if row[name] is not None]
    if not values:
        return {"mean": None, "worst": None}
    higher_is_better = name in ("psnr", "ssim", "cosine")
    broken = [v for v in values if math.isnan(v)]
    worst = broken[0] if broken else (min if higher_is_better else max)(values)
    return {"mean": sum(values) / len(values), "worst": worst}


def _side(side: Side) -> dict[str, Any]:
    return {**dataclasses.asdict(side), "median_seconds": side.median_seconds}


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on beside the arguments."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "omniq": omniq_compile.__version__,
        "torch": torch.__version__,
        "device": str(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write what `to_json` makes of the content, whole or not at all.

    Raises:
        OptionError: it cannot be written.
    """
    text = to_json(content, indent=1)
    try:
        with written_whole(file) as place:
            place.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{file} cannot be written: {error}.") from error
