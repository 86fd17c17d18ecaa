"""Time omniq's own 8-bit GEMMs on this GPU in each of several tiles, beside those of PyTorch.

    python docs/measure_tiles.py > tiles.md

Prints a Markdown table a size: microseconds of a product, the median of five CUDA graphs of ten,
and 1e12 operations a second. A tile is ``rows x columns x k, warps, stages``; ``TMA`` is a
persistent one, and ``group`` how many rows of tiles are computed side by side.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from omniq_compile.benchmark.machine import captured, time_calls
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.triton_kernels import launch
from omniq_compile.lowering.triton_kernels.tiles import Tile

# M, N and K: the linears of Qwen-Image and Wan2.2-14B, those of a short text, and few rows.
SIZES = [
    (4096, 3072, 3072), (4096, 12288, 3072), (4096, 3072, 12288),
    (4096, 5120, 5120), (4096, 13824, 5120), (4096, 5120, 13824),
    (1024, 3072, 3072), (1024, 12288, 3072), (512, 5120, 5120),
    (128, 3072, 3072), (128, 12288, 3072), (128, 3072, 12288),
]  # fmt: skip
LARGE = [
    Tile(128, 256, 128, 8, 3), Tile(128, 256, 128, 8, 4), Tile(256, 128, 128, 8, 3),
    Tile(128, 128, 128, 8, 4), Tile(128, 256, 64, 8, 4),
    *(
        Tile(rows, columns, 128, 4, stages, persistent=True, group_m=group)
        for rows, columns in ((128, 256), (256, 128))
        for stages in (3, 4)
        for group in (8, 16)
    ),
    Tile(128, 128, 128, 4, 4, persistent=True),
]  # fmt: skip
SMALL = [
    Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 8, 4), Tile(128, 64, 128, 4, 4),
    Tile(64, 128, 128, 4, 5), Tile(64, 64, 128, 4, 4), Tile(64, 64, 256, 4, 3),
    Tile(64, 64, 256, 4, 4), Tile(64, 32, 256, 4, 4),
]  # fmt: skip
CALLS, REPEATS = 10, 5


def seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of a call, which is captured: it can be shorter than its launch."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    run = captured(calls)
    times = []
    for _ in range(REPEATS):
        run()
        times.append(time_calls(run, torch.device("cuda")).seconds / CALLS)
    return statistics.median(times)


def products(M: int, N: int, K: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each way to multiply, by name."""
    x, w = (torch.randn(rows, K, device="cuda", dtype=torch.bfloat16) for rows in (M, N))
    yield "BF16, cuBLAS", lambda: F.linear(x, w)
    for name in ("fp8", "int8"):
        (a, a_scale), (b, b_scale) = (get_format(name).quantize(t) for t in (x, w))
        if name == "fp8":
            scales = a_scale.unsqueeze(-1), b_scale.unsqueeze(0)
            yield (
                "fp8, torch._scaled_mm by row",
                lambda a=a, b=b, scales=scales: torch._scaled_mm(
                    a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True
                ),
            )
        else:
            yield "int8, torch._int_mm (int32)", lambda a=a, b=b: torch._int_mm(a, b.t())
        out = torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
        device = launch.device_of(out.device)
        record = launch.row_scaled(a, a_scale, b, b_scale, None, out, False, device)
        for tile in LARGE if M >= 4096 else SMALL:
            one = dataclasses.replace(record, tiles=(tile,))
            yield f"{name}, {label(tile)}", lambda one=one: launch.run(one)


def label(tile: Tile) -> str:
    """Name a tile as the table does."""
    tma = ", TMA" if tile.persistent else ""
    size = f"{tile.block_m} x {tile.block_n} x {tile.block_k}"
    return f"{size}, {tile.warps} warps, {tile.stages} stages{tma}, group {tile.group_m}"


def main() -> None:
    """Print the tables."""
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    for M, N, K in SIZES:
        print(f"\n## M = {M}, N = {N}, K = {K}\n\n| | us | TOPS |\n| --- | --- | --- |", flush=True)
        for what, call in products(M, N, K):
            took = seconds(call)
            print(f"| {what} | {took * 1e6:.1f} | {2 * M * N * K / took / 1e12:.0f} |", flush=True)


if __name__ == "__main__":
    main()
