"""How much memory a model takes, and the most that a call adds."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omniq_compile.lowering.tensor_of_parts import inner_tensors


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and persistent buffers; tied ones count once."""
    # Without keep_vars each name would have a tensor of its own.
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(map(_nbytes, tensors.values()))


def footprint(model: nn.Module, return_buffers: bool = True) -> int:
    """Return what ``get_memory_footprint`` of diffusers and transformers does, in bytes.

    Theirs reckons a quantized weight with the dtype of what it stands for.
    """
    buffers = model.buffers() if return_buffers else ()
    return sum(_nbytes(tensor) for tensor in (*model.parameters(), *buffers))


def peak_of_call(call: Callable[[], Any], device: torch.device) -> int | None:
    """Call once and return the most bytes that this added to those in use.

    None where the system cannot tell. On the CPU `peak_rss` starts anew here.
    """
    if device.type != "cpu":
        return _peak_on_accelerator(call, device)
    status = Path("/proc/self/status")
    gc.collect()  # what it frees during the call would be taken off the call's own
    try:
        # Writing 5 resets VmHWM, the peak of resident memory: see proc(5).
        Path("/proc/self/clear_refs").write_text("5")
        before = status.read_text()
    except OSError:
        call()
        return None
    call()
    return max(0, _kib(status.read_text(), "VmHWM") - _kib(before, "VmRSS")) * 1024


def _peak_on_accelerator(call: Callable[[], Any], device: torch.device) -> int | None:
    statistics: Any = torch.get_device_module(device)
    if not hasattr(statistics, "reset_peak_memory_stats"):  # as of torch.mps
        call()
        return None
    statistics.reset_peak_memory_stats(device)
    held = statistics.memory_allocated(device)
    call()
    return int(statistics.max_memory_allocated(device) - held)


def release_unused(device: torch.device) -> None:
    """Give back what a device's allocator keeps for later, where it keeps anything."""
    module: Any = torch.get_device_module(device)
    if hasattr(module, "empty_cache"):
        module.empty_cache()


def peak_rss() -> int:
    """Return the process's highest resident memory in bytes, since `peak_of_call` reset it.

    0 where the system cannot tell.
    """
    if sys.platform == "linux":
        # getrusage(2) has the peak of the process that started this one, if that is higher.
        return _kib(Path("/proc/self/status").read_text(), "VmHWM") * 1024
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _nbytes(tensor: Tensor) -> int:
    # A subclass may report the bytes of what it stands for; those inside it are the real ones.
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(map(_nbytes, inner_tensors(tensor)))
    return tensor.nbytes


def _kib(status: str, key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) if match else 0
