"""A target: a device and its architecture as data.

A target can be named on a machine that does not have it, so that a graph for any device can be
lowered and read anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omniq_compile.lowering.errors import OptionError, unknown

# Per device, the architectures that kernels tell apart, the most capable first.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "cpu": ("avx512_bf16", "avx512_vnni", "generic"),
}


@dataclass(frozen=True)
class Target:
    """A device type and one of its architectures, such as ``cpu:avx512_vnni``."""

    device: str
    arch: str

    def __str__(self) -> str:
        return f"{self.device}:{self.arch}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``device`` or ``device:arch``; a bare device means this machine's architecture.

        Raises:
            OptionError: the device or the architecture is not one omniq lowers to.
        """
        device, _, arch = text.strip().lower().partition(":")
        if device not in ARCHITECTURES:
            raise OptionError(unknown("target device", device, ARCHITECTURES))
        if not arch:
            return detect(device)
        if arch not in ARCHITECTURES[device]:
            raise OptionError(unknown(f"{device} architecture", arch, ARCHITECTURES[device]))
        return cls(device, arch)


def detect(device: str) -> Target:
    """Return the target for a ``torch.device`` type of this machine, such as ``"cpu"``.

    Raises:
        OptionError: omniq has no kernels for that device type.
    """
    if device not in ARCHITECTURES:
        raise OptionError(
            f"omniq has no kernels for device {device!r}; it has for: {', '.join(ARCHITECTURES)}. "
            "Move the model there, or compile it with backend='inductor'."
        )
    return Target("cpu", _cpu_architecture())


def _cpu_architecture() -> str:
    # oneDNN reaches its fast s8 GEMM through AVX-512 VNNI or AMX; every other CPU would run
    # `torch._int_mm` as a plain loop (measured 30 times slower than a float32 GEMM on AVX2).
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_vnni") or capabilities.get("amx_int8")):
        return "generic"
    # Every CPU so far that has BF16 dot products has VNNI too.
    fast_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "avx512_bf16" if fast_bfloat16 else "avx512_vnni"
