"""A target: a device and its architecture as data.

A target can be named on a machine that does not have it, so that a graph for any device can be
lowered and read anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from omniq_compile.lowering.errors import OptionError, unknown

# Per device, the architectures that kernels tell apart, the most capable first.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "cpu": ("avx512_bf16", "avx512_vnni", "generic"),
    "cuda": ("sm_120", "sm_100", "sm_90", "sm_89", "sm_80"),
    "rocm": ("gfx950", "gfx942", "gfx1201", "gfx1100", "gfx90a"),
    "xpu": ("xe",),
    "npu": ("ascend950", "ascend910b"),
}

# PyTorch calls AMD's GPUs "cuda" too.
TORCH_DEVICES = {"rocm": "cuda"}

# GPUs that have the instructions of an architecture, and are lowered for as that one.
ALIKE = {
    "cuda": {
        "sm_86": "sm_80", "sm_87": "sm_80", "sm_103": "sm_100", "sm_110": "sm_89",
        "sm_121": "sm_120",
    },
    "rocm": {
        "gfx908": "gfx90a", "gfx1101": "gfx1100", "gfx1102": "gfx1100", "gfx1103": "gfx1100",
        "gfx1150": "gfx1100", "gfx1151": "gfx1100", "gfx1152": "gfx1100", "gfx1153": "gfx1100",
        "gfx1200": "gfx1201",
    },
}  # fmt: skip

# What a machine of an architecture can also run. Later NVIDIA GPUs run what was lowered for sm_89
# and sm_80. Instructions of sm_90's and sm_100's own run nowhere else.
RUNS = {
    "cpu:avx512_bf16": ("avx512_vnni", "generic"),
    "cpu:avx512_vnni": ("avx512_bf16", "generic"),
    "cpu:generic": ("avx512_bf16", "avx512_vnni"),
    "cuda:sm_120": ("sm_89", "sm_80"),
    "cuda:sm_100": ("sm_89", "sm_80"),
    "cuda:sm_90": ("sm_89", "sm_80"),
    "cuda:sm_89": ("sm_80",),
}


@dataclass(frozen=True)
class Target:
    """A device type and one of its architectures, such as ``cpu:avx512_vnni``."""

    device: str
    arch: str

    def __str__(self) -> str:
        return f"{self.device}:{self.arch}"

    @property
    def torch_device(self) -> str:
        """The type of the ``torch.device`` that its tensors are on."""
        return TORCH_DEVICES.get(self.device, self.device)

    def runs(self, other: Target) -> bool:
        """Say whether a machine of this target runs what was lowered for another."""
        return other == self or (
            other.device == self.device and other.arch in RUNS.get(str(self), ())
        )

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``device`` or ``device:arch``; a bare device means this machine's architecture.

        A GPU that has another one's instructions is that one: ``cuda:sm_86`` is ``cuda:sm_80``.

        Raises:
            OptionError: the device or the architecture is not one omniq lowers to, or a bare
                device is not in this machine.
        """
        if not isinstance(text, str):
            raise OptionError(f"a target must be text such as 'cpu' or 'cuda:sm_90', not {text!r}.")
        device, colon, arch = text.strip().lower().partition(":")
        if device not in ARCHITECTURES:
            raise OptionError(unknown("target device", device, ARCHITECTURES))
        archs = ARCHITECTURES[device]
        if colon:
            arch = ALIKE.get(device, {}).get(arch, arch)
            if arch not in archs:
                why = _too_early(device, arch)
                raise OptionError(why or unknown(f"{device} architecture", arch, archs))
            return cls(device, arch)
        if len(archs) == 1:
            return cls(device, archs[0])
        found = present(device)
        if found is None:
            raise OptionError(
                f"target {device!r} means the {device} device of this machine, and it has none. "
                f"Name an architecture: {', '.join(f'{device}:{a}' for a in archs)}."
            )
        return found


def present(device: str) -> Target | None:
    """Return this machine's target of a device of `ARCHITECTURES`, or None where it has none.

    Raises:
        OptionError: it has one whose architecture omniq has no kernels for.
    """
    torch_device = TORCH_DEVICES.get(device, device)
    module = getattr(torch, torch_device, None)
    if module is None or not module.is_available():
        return None
    found = detect(torch_device)
    return found if found.device == device else None


def detectable(torch_device: str | torch.device) -> bool:
    """Say whether omniq has kernels for a ``torch.device``, by its type."""
    return str(torch_device).partition(":")[0] in _DETECT


def detect(torch_device: str | torch.device) -> Target:
    """Return the target that a device of this machine is, such as ``"cuda"`` or ``"cuda:1"``.

    Without an index it is the current one; a machine may have GPUs of several architectures.

    Raises:
        OptionError: omniq has no kernels for that device type, or for its architecture.
    """
    kind, _, index = str(torch_device).partition(":")
    if kind not in _DETECT:
        raise OptionError(
            f"omniq has no kernels for device {kind!r}; it has for: "
            f"{', '.join(_DETECT)}. Move the model there, or compile it with backend='inductor'."
        )
    return _DETECT[kind](int(index) if index else None)


def _cpu(index: int | None) -> Target:
    # oneDNN reaches its fast s8 GEMM through AVX-512 VNNI or AMX; every other CPU would run
    # `torch._int_mm` as a plain loop (measured 30 times slower than a float32 GEMM on AVX2).
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_vnni") or capabilities.get("amx_int8")):
        return Target("cpu", "generic")
    # Every CPU so far that has BF16 dot products has VNNI too.
    fast_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return Target("cpu", "avx512_bf16" if fast_bfloat16 else "avx512_vnni")


def _cuda(index: int | None) -> Target:
    if torch.version.hip:
        # Such as "gfx942:sramecc+:xnack-".
        name = torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
        return _known("rocm", ALIKE["rocm"].get(name, name), name)
    capability = torch.cuda.get_device_capability(index)
    major, minor = capability
    # Those that have no row of their own, such as 11.0, have what 8.9 has.
    arch = {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(major, "")
    if not arch and capability >= (8, 0):
        arch = "sm_89" if capability >= (8, 9) else "sm_80"
    return _known("cuda", arch, f"compute capability {major}.{minor}")


def _xpu(index: int | None) -> Target:
    return Target("xpu", "xe")


def _npu(index: int | None) -> Target:
    # torch_npu adds the module; its names are those of NpuVariables.cpp. A2 is "Ascend910B1" to
    # "Ascend910B4-1", and A3 "Ascend910_9391" and such. Those before ("Ascend910B" itself is one,
    # and "Ascend310P3") have no such GEMM with a float bias, or none (aclnnQuantMatmulV5).
    npu: Any = torch.npu  # type: ignore[attr-defined]
    name = str(npu.get_device_name(index))
    if name.startswith("Ascend950"):
        return Target("npu", "ascend950")
    arch = "ascend910b" if re.match(r"Ascend910(B\d|_93)", name) else ""
    return _known("npu", arch, name)


def _too_early(device: str, arch: str) -> str | None:
    """Word the refusal of an NVIDIA GPU from before those that there are kernels for."""
    if device != "cuda" or not arch.startswith("sm_") or not arch[3:].isdigit():
        return None
    if int(arch[3:]) >= 80:
        return None
    return f"omniq has no kernels for {arch}: of NVIDIA's GPUs it has some from sm_80 on."


def _known(device: str, arch: str, found: str) -> Target:
    if arch in ARCHITECTURES[device]:
        return Target(device, arch)
    raise OptionError(
        f"omniq has no kernels for this {device} device ({found}); it has for: "
        f"{', '.join(ARCHITECTURES[device])}. Compile with backend='inductor'."
    )


_DETECT = {"cpu": _cpu, "cuda": _cuda, "xpu": _xpu, "npu": _npu}
