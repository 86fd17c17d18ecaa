"""FLUX with its transformer quantized, and one LoRA after the other.

    python examples/flux_lora.py first/lora second/lora --prompt "a fox in the snow" --device cuda

`pip install peft` for adapters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import omniq_compile as omniq

CALL = {"guidance_scale": 3.5, "num_inference_steps": 28}


def load(model: str | Path, method: str, device: str) -> Any:
    """Load the pipeline with its transformer quantized and compiled."""
    pipe = omniq.from_pretrained(model, quantization=method, device=device)
    omniq.compile(pipe.transformer, {"method": method})
    return pipe.to(device)


def draw(
    pipe: Any, adapters: Sequence[str], seed: int = 0, **call: Any
) -> Iterator[tuple[str, Image.Image]]:
    """Draw without an adapter, and with each: its matrices run in BF16 beside quantized layers."""
    for number, adapter in enumerate(["", *adapters]):
        if adapter:
            pipe.load_lora_weights(adapter, adapter_name=f"adapter_{number}")
        generator = torch.Generator("cpu").manual_seed(seed)
        yield adapter, pipe(generator=generator, **call).images[0]
        if adapter:
            pipe.unload_lora_weights()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="*", help="folders, files or hub ids of LoRAs")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="folder or hub id")
    parser.add_argument("--method", default="fp8")
    parser.add_argument("--prompt", default="a fox in the snow")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    arguments = parser.parse_args()
    pipe = load(arguments.model, arguments.method, arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    drawn = draw(pipe, arguments.adapters, prompt=arguments.prompt, **CALL)
    for number, (adapter, picture) in enumerate(drawn):
        picture.save(arguments.out / f"{number}.png")
        print(f"{number}.png: {adapter or 'no adapter'}")


if __name__ == "__main__":
    main()
