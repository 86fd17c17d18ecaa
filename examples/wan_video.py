"""Wan2.2 with both of its experts quantized: stored once, and loaded from there ever after.

    python examples/wan_video.py --method fp8 --prompt "a fox runs in the snow" --device cuda

`pip install imageio imageio-ffmpeg` for the video file.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import export_to_video

import omniq_compile as omniq

CALL = {"height": 480, "width": 832, "num_frames": 81}
EXPERTS = ("transformer", "transformer_2")


def load(model: str | Path, stored: Path, method: str, device: str) -> Any:
    """Load the quantized pipeline; the first time make it of the one in BF16."""
    if not stored.exists():
        quantization = dict.fromkeys(EXPERTS, method)
        omniq.from_pretrained(model, quantization=quantization).save_pretrained(stored)
    pipe = omniq.from_pretrained(stored, device=device)
    for name in EXPERTS:
        omniq.compile(getattr(pipe, name), {"method": method})
    return pipe.to(device)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="Wan-AI/Wan2.2-T2V-A14B-Diffusers", help="folder, hub id"
    )
    parser.add_argument("--stored", type=Path, default=Path("wan-quantized"))
    parser.add_argument("--method", default="fp8")
    parser.add_argument("--prompt", default="a fox runs in the snow")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("video.mp4"))
    arguments = parser.parse_args()
    pipe = load(arguments.model, arguments.stored, arguments.method, arguments.device)
    start = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(0)
    frames = pipe(prompt=arguments.prompt, generator=generator, **CALL).frames[0]
    print(f"{len(frames)} frames in {time.perf_counter() - start:.0f} s")
    export_to_video(frames, str(arguments.out), fps=16)


if __name__ == "__main__":
    main()
