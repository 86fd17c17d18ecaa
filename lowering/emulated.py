"""The rows that any device can have: codes decoded in each call, multiplied in a wider dtype.

What stays in memory are the codes, and the numbers are those of native hardware up to the order of
accumulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omniq_compile.lowering import decoded, decoded_bfloat16, gpu_quantize, int8_gemms
from omniq_compile.lowering.registry import Kernel

# The methods that are decoded here, and the elements of their codes, for the reason that is shown.
ELEMENTS = {"fp8": "e4m3", "mxfp8": "e4m3", "mxfp4": "e2m1", "mxfp4_dualscale": "e2m1"}


def float32(device: str, archs: Sequence[str], method: str, why: str) -> Kernel:
    """Make the row that decodes to float32, which holds every code and every scale exactly.

    Args:
        device, archs: where it is offered.
        method: a key of `ELEMENTS`.
        why: what lacks the arithmetic, such as ``"no e4m3 arithmetic on CPUs"``.
    """
    return Kernel(
        name=f"{device}_{method}_float32",
        method=method,
        device=device,
        archs=tuple(archs),
        native=False,
        about=f"{why}: codes decoded and multiplied exactly in float32",
        quantize=decoded.fake_quantize,
        gemm=decoded.gemm,
        refuse=decoded.refuse,
        decodes_whole=True,
    )


def bfloat16(device: str, archs: Sequence[str], method: str, why: str) -> Kernel:
    """Make the row that decodes ``mxfp8`` or ``mxfp4`` to BF16, exactly, for a fast BF16 GEMM."""
    on_gpu = device in ("cuda", "rocm")
    return Kernel(
        name=f"{device}_{method}_bfloat16",
        method=method,
        device=device,
        archs=tuple(archs),
        native=False,
        about=f"{why}: decoded exactly to BF16, BF16 GEMM",
        quantize=gpu_quantize.quantize_bfloat16 if on_gpu else decoded_bfloat16.fake_quantize,
        gemm=decoded_bfloat16.gemm,
        refuse=decoded_bfloat16.refuse,
        decodes_whole=True,
    )


def int8(device: str, archs: Sequence[str], why: str) -> Kernel:
    """Make the row that multiplies int8 codes by float32 GEMMs over short runs of K, exactly."""
    return Kernel(
        name=f"{device}_s8_float32",
        method="int8",
        device=device,
        archs=tuple(archs),
        native=False,
        about=f"{why}: codes multiplied exactly by float32 GEMMs over short runs of K",
        quantize=int8_gemms.quantize,
        gemm=int8_gemms.gemm_float32,
        refuse=int8_gemms.refuse,
    )


def kernels(
    device: str,
    archs: Sequence[str],
    why: str | Mapping[str, str],
    bfloat16_archs: Sequence[str] = (),
) -> tuple[Kernel, ...]:
    """Make the rows that decode, for each method of `ELEMENTS`, the faster first; int8's is `int8`.

    Args:
        device, archs: where they are offered.
        why: where the arithmetic is missing, such as ``"CPUs"``; or the device's own reasons by
            method, without which it is missing on the device.
        bfloat16_archs: those of ``archs`` whose BF16 GEMMs are fast.
    """
    place, own = (why, {}) if isinstance(why, str) else (device, dict(why))
    reasons = {method: f"no {x} arithmetic on {place}" for method, x in ELEMENTS.items()} | own
    fast = [bfloat16(device, bfloat16_archs, name, reasons[name]) for name in ("mxfp8", "mxfp4")]
    exact = [float32(device, archs, name, reasons[name]) for name in ELEMENTS]
    return (*(fast if bfloat16_archs else ()), *exact)
