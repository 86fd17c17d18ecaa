"""Z-Image in BF16 and again through omniq, from the same seed: how fast, and how alike.

    python examples/z_image.py --method int8 --prompt "a fox in the snow" --device cuda

Nothing of omniq is imported: PyTorch finds the backend by its name.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ZImagePipeline

# As its model card has it, which was distilled to few steps.
CALL = {"num_inference_steps": 9, "guidance_scale": 0.0}


def draw(pipe: Any, seed: int, **call: Any) -> tuple[np.ndarray, float, float]:
    """Return a picture ``[height, width, 3]``, and the seconds of a first and of a second call."""
    seconds = []
    for _ in range(2):  # the first compiles
        start = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(seed)
        picture = pipe(generator=generator, output_type="np", **call).images[0]
        seconds.append(time.perf_counter() - start)
    return picture, *seconds


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of pictures from 0 to 1, in dB."""
    return float(-10 * np.log10(np.mean((picture - reference) ** 2)))


def run(pipe: Any, method: str, seed: int = 0, **call: Any) -> dict[str, np.ndarray]:
    """Draw with Inductor's BF16 and with omniq, and print how long it took."""
    transformer = pipe.transformer
    bf16 = torch.compile(transformer)
    quantized = torch.compile(transformer, backend="omniq", options={"method": method})
    pictures = {}
    for name, compiled in (("bf16", bf16), (method, quantized)):
        pipe.transformer = compiled
        pictures[name], first, second = draw(pipe, seed, **call)
        print(f"{name}: {first:.1f} s the first time, {second:.2f} s the second")
    print(f"PSNR to BF16: {psnr(pictures[method], pictures['bf16']):.1f} dB")
    return pictures


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Tongyi-MAI/Z-Image-Turbo", help="a folder or a hub id")
    parser.add_argument("--method", default="int8")
    parser.add_argument("--prompt", default="a fox in the snow")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    arguments = parser.parse_args()
    pipe = ZImagePipeline.from_pretrained(arguments.model, dtype=torch.bfloat16)
    pipe.to(arguments.device)
    pictures = run(pipe, arguments.method, prompt=arguments.prompt, **CALL)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        pipe.image_processor.numpy_to_pil(picture)[0].save(arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
