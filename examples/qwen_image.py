"""Qwen-Image with its transformer and its text encoder quantized, in several sizes of pictures.

    python examples/qwen_image.py --method int8 --prompt "a fox in the snow" --device cuda

Both are quantized while they load, so that 57 GB of BF16 weights are never in memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import omniq_compile as omniq

CALL = {"negative_prompt": " ", "true_cfg_scale": 4.0}
SIZES = ((1328, 1328), (928, 1664), (1664, 928))


def load(model: str | Path, method: str, device: str) -> Any:
    """Load the pipeline, and compile what runs in every step."""
    pipe = omniq.from_pretrained(
        model, quantization={"transformer": method, "text_encoder": method}, device=device
    )
    # One compile serves all blocks. The text encoder runs once a picture, uncompiled.
    omniq.compile(pipe.transformer, {"method": method})
    return pipe.to(device)


def draw(
    pipe: Any, sizes: Iterable[tuple[int, int]], seed: int = 0, **call: Any
) -> list[Image.Image]:
    """Draw one picture of each width and height; a third size is compiled no more."""
    pictures = []
    for width, height in sizes:
        start = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(seed)
        pictures += pipe(width=width, height=height, generator=generator, **call).images
        print(f"{width} x {height}: {time.perf_counter() - start:.1f} s")
    return pictures


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen-Image", help="a folder or a hub id")
    parser.add_argument("--method", default="int8")
    parser.add_argument("--prompt", default="a fox in the snow")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    arguments = parser.parse_args()
    pipe = load(arguments.model, arguments.method, arguments.device)
    pictures = draw(pipe, SIZES, prompt=arguments.prompt, **CALL)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for (width, height), picture in zip(SIZES, pictures, strict=True):
        picture.save(arguments.out / f"{width}x{height}.png")


if __name__ == "__main__":
    main()
