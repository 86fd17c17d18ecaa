"""The suites of ``omniq bench --suite``: a suite is a row, and so is each of its cases."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One block of one transformer at one size; width None is the released width."""

    name: str
    model: str
    image_tokens: int
    text_tokens: int
    width: int | None = None


@dataclass(frozen=True)
class Suite:
    """Cases that are measured one after the other on one device, with the variants in turn.

    Attributes:
        peak_size: M, N and K of the square GEMMs whose rate counts as the device's peak.
        gemm_calls: how often a GEMM is called for one timing, on a GPU in one CUDA graph.
    """

    about: str
    device: str
    rounds: int
    warmup: int
    peak_size: int
    gemm_calls: int
    cases: tuple[Case, ...]


QWEN, WAN = "QwenImageTransformer2DModel", "WanTransformer3DModel"

SUITES = {
    "h200": Suite(
        about="one Qwen-Image block (width 3072) and one Wan2.2-14B block (width 5120)",
        device="cuda",
        rounds=15,
        warmup=5,
        peak_size=8192,
        gemm_calls=20,
        cases=(
            Case("Qwen-Image block, 1024 tokens", QWEN, 1024, 128),
            Case("Qwen-Image block, 4096 tokens", QWEN, 4096, 128),
            Case("Qwen-Image block, 16384 tokens", QWEN, 16384, 128),
            Case("Wan2.2-14B block, 4096 tokens", WAN, 4096, 512),
        ),
    ),
    "smoke": Suite(
        about="the code of the h200 suite on a CPU, at sizes whose figures mean nothing",
        device="cpu",
        rounds=2,
        warmup=1,
        peak_size=256,
        gemm_calls=2,
        cases=(
            Case("Qwen-Image block, 64 tokens", QWEN, 64, 16, width=256),
            Case("Wan2.2 block, 64 tokens", WAN, 64, 16, width=256),
        ),
    ),
}
