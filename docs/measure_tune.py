"""Measure what `omniq tune` gains over fixed rules at the same bytes: the tables of docs/tune.md.

python docs/measure_tune.py digits             # the trained digits, about five minutes
python docs/measure_tune.py planted --width 3072   # three full-width blocks with planted outliers

Rules that know nothing of a model: quantize all layers; keep the MLPs; quantize all and spend the
bytes that keeping the MLPs would take on the first layers of the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from rich.console import Console
from torch import nn

from omniq_compile.pipelines.components import build_quant_config
from omniq_compile.quality.comparison import Setting
from omniq_compile.quality.layer_units import Layer, quantized_layers
from omniq_compile.quality.tune_goal import Goal
from omniq_compile.quality.tune_state import TuneState, fingerprint
from omniq_compile.quality.tuning import generate_anew, tune

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "pipeline"
MLPS = ["img_mlp", "txt_mlp"]

# Outliers enter these layers: (block, layer, the layer whose rows make its inputs).
PLANTED = (
    (0, "img_mlp.net.2", "img_mlp.net.0.proj"),
    (1, "attn.to_out.0", "attn.to_v"),
    (1, "attn.to_add_out", "attn.add_v_proj"),
    (2, "attn.to_out.0", "attn.to_v"),
)
GAIN = 100.0
OUTLIERS = 0.002  # of the channels


def plant_outliers(folder: Path, width: int, num_blocks: int = 3) -> Path:
    """Save a digits pipeline whose transformer has random weights, and outliers in some layers.

    A few channels that enter each layer of ``PLANTED`` are ``GAIN`` times as large, and its weights
    take that back: a scale per token then leaves little of the other channels.
    """
    torch.manual_seed(0)
    head = 128 if width % 128 == 0 and width > 128 else 32
    side = head * 7 // 16 // 2 * 2
    config = json.loads((DIGITS / "transformer" / "config.json").read_text())
    config |= {
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "num_layers": num_blocks,
        "axes_dims_rope": [head - 2 * side, side, side],
    }
    with torch.device("meta"):
        model: Any = QwenImageTransformer2DModel.from_config(config)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(drawn(parameter), requires_grad=False)
    for block, layer, source in PLANTED:
        inside = model.transformer_blocks[block]
        into, out = inside.get_submodule(layer), inside.get_submodule(source)
        count = max(1, round(OUTLIERS * into.in_features))
        channels = torch.randperm(into.in_features)[:count]
        out.weight[channels] *= GAIN
        out.bias[channels] *= GAIN
        into.weight[:, channels] /= GAIN
    model.register_to_config(**{k: v for k, v in config.items() if not k.startswith("_")})
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DIGITS, folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    # As it is in memory: on the CPU and in BF16, though it was made on the meta device.
    model.save_pretrained(folder / "transformer")
    return folder


def drawn(like: torch.Tensor) -> torch.Tensor:
    """Return random values of a parameter's shape, in BF16, that keep activations of order 1."""
    if like.ndim < 2:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    return torch.randn(like.shape, dtype=torch.bfloat16).mul_(like.shape[1] ** -0.5)


def leading(layers: list[Layer], spare: int) -> list[str]:
    """Return the first layers of a model, as many as fit in some bytes."""
    names = []
    for layer in layers:
        if layer.extra_bytes <= spare:
            spare -= layer.extra_bytes
            names.append(layer.name)
        else:
            break
    return names


def measure(
    folder: Path, options: dict[str, Any], arguments: dict[str, Any], seeds: list[int], work: Path,
    gain: float, console: Console, **how: Any,
) -> list[tuple[str, int, float, int]]:  # fmt: skip
    """Return rows of (rule, bytes, PSNR of the worst seed, layers kept), all by real generation."""
    config = build_quant_config(options)
    setting = Setting(str(folder), config, arguments, seeds, loading={"trust_remote_code": True})
    work.mkdir(parents=True, exist_ok=True)
    about = {"folder": fingerprint(str(folder), {}), "arguments": arguments, "options": options}
    state = TuneState(work / "state.json", about)
    layers = layers_of(folder, options)

    def log(what: str) -> None:
        console.log(what)

    def rule(name: str, ignored: list[str]) -> tuple[str, int, float, int]:
        kept = [layer.name for layer in layers]
        changed = build_quant_config({**options, "ignored_layers": ignored})
        left = {layer.name for layer in layers_of(folder, changed.everywhere or {})}
        values, nbytes = generate_anew(setting, changed, ["transformer"], work)
        return name, nbytes, min(values), len([k for k in kept if k not in left])

    # Any goal writes the reference pictures; this one is met by keeping nothing.
    nothing_kept = tune(setting, Goal(psnr=1e-3), state, work, log, **how)
    rows = [rule("all layers quantized", []), rule("the MLPs kept", MLPS)]
    limit = rows[1][1]
    spare = limit - rows[0][1]
    rows.append(rule("the first layers kept, as many bytes", leading(layers, spare)))
    for name, goal in (
        ("tuned, as many bytes as the MLPs", Goal(max_bytes=limit)),
        ("tuned, to reach what the MLPs kept reach", Goal(psnr=max(row[2] for row in rows[:3]))),
        (f"tuned, {gain:g} dB over all quantized", Goal(psnr=rows[0][2] + gain)),
    ):
        found = tune(setting, goal, state, work, log, **how)
        rows.append((name, found.nbytes, min(found.seed_psnr), len(found.kept)))
        console.log(name, json.dumps(found.quantization["ignored_layers"]))
    rows.append(("BF16", nothing_kept.nbytes_bf16, float("inf"), len(layers)))
    return rows


def layers_of(folder: Path, options: Any) -> list[Layer]:
    """Return the layers that options quantize, without loading a weight."""
    from omniq_compile.checkpoints.checkpoint_folder import read_config
    from omniq_compile.checkpoints.loading import empty_model
    from omniq_compile.passes.config import QuantConfig

    about = read_config(folder / "transformer")
    model = empty_model(QwenImageTransformer2DModel, about, torch.bfloat16)
    return quantized_layers("transformer", model, QuantConfig.from_options(options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("digits", "planted"))
    parser.add_argument("--method", default=None)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--out", type=Path, default=Path("tune"))
    args = parser.parse_args()
    console, start = Console(stderr=True, width=200), time.perf_counter()
    options: dict[str, Any] = {"min_features": 64, "compiler": "aot_eager"}
    if args.model == "digits":
        options["method"] = args.method or "mxfp4"
        arguments: dict[str, Any] = {"digits": list(range(10)), "num_inference_steps": 10}
        rows = measure(
            DIGITS, options, arguments, [0, 1], args.out, 5, console, most_calls=4, curve=2
        )
    else:
        options["method"] = args.method or "int8"
        folder = plant_outliers(args.out / "pipeline", args.width)
        arguments = {"digits": [0, 1, 2, 3, 4], "num_inference_steps": 4}
        how = {"most_calls": 2, "curve": 2}
        rows = measure(folder, options, arguments, [0], args.out, 10, console, **how)
    print("| rule | bytes of weights | PSNR of the worst seed | layers kept |")
    print("| --- | --- | --- | --- |")
    for name, nbytes, quality, kept in rows:
        print(f"| {name} | {nbytes:,} | {quality:.1f} dB | {kept} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\n{options}, {arguments}: {time.perf_counter() - start:.0f} s, peak {peak:.1f} GB")


if __name__ == "__main__":
    main()
