"""Measure what each method costs in accuracy, and write the tables of docs/methods.md.

python docs/measure_methods.py            # both tables, about ten minutes on two cores
python docs/measure_methods.py --weights  # only the table of weights
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import omniq_compile as omniq
from omniq_compile.models.families import FAMILIES
from omniq_compile.models.random_models import make_inputs, random_model

PAGE = Path(__file__).parent / "methods.md"
SEED = 0

METHODS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "fp8": {"method": "fp8"},
    "fp8, blocks of 128 x 128": {"method": "fp8", "weight_block_size": [128, 128]},
    "mxfp8": {"method": "mxfp8"},
    "mxfp4": {"method": "mxfp4"},
    "mxfp4, UOS": {"method": "mxfp4", "mxfp4_scale_alg": 2},
    "mxfp4, W4A8 everywhere": {"method": "mxfp4", "w4a8_fallback_layers": ["re:.*"]},
    "mxfp4_dualscale": {"method": "mxfp4_dualscale"},
    "mxfp4_dualscale, UOS": {"method": "mxfp4_dualscale", "mxfp4_scale_alg": 2},
    **{
        f"{method}, weights alone": {"method": method, "activation_scheme": "none"}
        for method in ("int8", "fp8", "mxfp8", "mxfp4")
    },
}

# A weight of the width of Qwen-Image, Wan2.2-TI2V-5B and FLUX.
N, K = 3072, 3072
OUTLIERS = 0.01  # of the channels
GAIN = 20.0


def gaussian() -> torch.Tensor:
    return torch.randn(N, K)


def laplace() -> torch.Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample((N, K))


def student() -> torch.Tensor:
    return torch.distributions.StudentT(2.0).sample((N, K))


def outlier_channels() -> torch.Tensor:
    return gaussian() * outlier_gains(K)


def pooled() -> torch.Tensor:
    """Give each row and each run of 512 a magnitude of its own, over four decades."""
    exponents = torch.rand(N, K // 512).repeat_interleave(512, 1) * 4 - 2
    return gaussian() * 10.0**exponents


DISTRIBUTIONS: dict[str, Callable[[], torch.Tensor]] = {
    "Gaussian": gaussian,
    "Laplace": laplace,
    "Student t, 2 degrees": student,
    "1% of channels x 20": outlier_channels,
    "random magnitudes": pooled,
}


def outlier_gains(channels: int) -> torch.Tensor:
    """Return a gain per channel: 1, but for 1% of them, spread at random."""
    gains = torch.ones(channels)
    gains[torch.randperm(channels)[: max(1, round(OUTLIERS * channels))]] = GAIN
    return gains


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).double().norm() / expected.double().norm())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def weight_table() -> str:
    torch.manual_seed(SEED)
    weights = {name: draw() for name, draw in DISTRIBUTIONS.items()}
    rows = []
    for name, options in METHODS.items():
        if "w4a8_fallback_layers" in options or "activation_scheme" in options:
            continue  # the same weights
        quantized = {n: omniq.quantize(w, **options) for n, w in weights.items()}
        bits = 8 * quantized["Gaussian"].nbytes / (N * K)
        errors = [f"{relative(q.dequantize(), weights[n]):.4f}" for n, q in quantized.items()]
        rows.append([name, f"{bits:.3f}", *errors])
    return table(["method", "bits per weight", *DISTRIBUTIONS], rows)


def block_errors(name: str, tokens: int, console: Console) -> dict[str, float]:
    """Return each method's error of one full-width block, on activations with outlier channels."""
    torch._dynamo.reset()
    model = random_model(name, num_blocks=1, dtype=torch.float32).eval().requires_grad_(False)
    inputs = make_inputs(
        model, image_tokens=tokens, text_tokens=tokens // 4, dtype=torch.float32, seed=SEED
    )
    torch.manual_seed(SEED)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            gains = outlier_gains(layer.in_features)
            # The weights take it back: outliers come in, and the block computes what it did.
            layer.weight.div_(gains)
            layer.register_forward_pre_hook(enlarge(gains))
    with torch.no_grad():
        expected = first_tensor(model(**inputs))
        errors = {}
        for method, options in track(METHODS.items(), name, console=console, total=len(METHODS)):
            torch._dynamo.reset()
            given = options | {"compiler": "eager"}
            if options["method"] == "mxfp4_dualscale":
                given["num_bf16_fallback_layers"] = 0  # the model is one block
            compiled = torch.compile(model, backend="omniq", options=given)
            errors[method] = relative(first_tensor(compiled(**inputs)), expected)
        torch._dynamo.reset()
        errors["BF16"] = relative(first_tensor(in_bfloat16(model, inputs)), expected)
    return errors


def enlarge(gains: torch.Tensor) -> Callable[..., Any]:
    def hook(_layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *rest = arguments
        return (x * gains.to(x.dtype), *rest)

    return hook


def in_bfloat16(model: nn.Module, inputs: dict[str, Any]) -> Any:
    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(torch.bfloat16)
        return value

    return model.to(torch.bfloat16)(**torch.utils._pytree.tree_map(cast, inputs))


def first_tensor(output: Any) -> torch.Tensor:
    leaves = torch.utils._pytree.tree_leaves(output)
    return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)).float()


def block_table(tokens: int, console: Console) -> str:
    errors = {name: block_errors(name, tokens, console) for name in FAMILIES}
    rows = [
        [method, *(f"{errors[name][method]:.4f}" for name in FAMILIES)]
        for method in ("BF16", *METHODS)
    ]
    heads = [re.sub(r"Transformer[23]DModel", "", name) for name in FAMILIES]
    return table(["method", *heads], rows)


def put(page: str, name: str, text: str) -> str:
    """Replace what stands between two comments of the page."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
    changed, count = re.subn(pattern, lambda m: m[1] + text + "\n" + m[2], page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{PAGE} has no place for {name!r}")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", action="store_true", help="only the table of weights")
    parser.add_argument("--tokens", type=int, default=144, help="image tokens of a block")
    args = parser.parse_args()
    console = Console()
    page = put(PAGE.read_text(encoding="utf-8"), "weights", weight_table())
    if not args.weights:
        page = put(page, "blocks", block_table(args.tokens, console))
    PAGE.write_text(page, encoding="utf-8")
    console.print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
