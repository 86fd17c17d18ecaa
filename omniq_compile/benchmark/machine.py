"""What a benchmark asks of the machine: its name, and the seconds of a call."""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omniq_compile import __version__
from omniq_compile.benchmark.result import BenchConfig


def environment(config: BenchConfig) -> dict[str, Any]:
    """Return what the numbers depend on: versions, device, threads, date, load."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "omniq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": _device_name(config.device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": config.dtype,
        "calls_before_timing": config.calls_before_timing,
        "calls_per_timing": config.calls_per_timing,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "unknown",
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    torch.get_device_module(device).synchronize(device)


@dataclass(frozen=True)
class Timing:
    """The seconds of a call, and those that the host takes to ask for it: None on the CPU."""

    seconds: float
    host_seconds: float | None


def time_calls(call: Callable[[], Any], device: torch.device, count: int = 1) -> Timing:
    """Call ``count`` times in a row, and return the mean times of a call.

    An accelerator does later what it is asked for, and is timed by its own clock. It is not waited
    for first: while it has work from before, what the host does ahead of the first call costs as
    little as it does ahead of the next ones. Where the host is the slower of the two, both times
    are its.
    """
    if device.type == "cpu":
        return Timing(_host_seconds(call, count), None)
    module: Any = torch.get_device_module(device)
    start, end = (module.Event(enable_timing=True) for _ in range(2))
    start.record()
    host = _host_seconds(call, count)
    end.record()
    end.synchronize()
    return Timing(float(start.elapsed_time(end)) / 1e3 / count, host)


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of a call.

    Raises:
        RuntimeError: the call waits for the device, or cannot be captured for another reason.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # what is made in a first call may not be made while a graph is captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model, and the tensors that its modules hold as plain attributes; returns it.

    Qwen-Image's rotary tables are such: a compiled forward of the whole model would copy them to
    the device in each call, and wait for it. That is once for all blocks of a denoising step.
    """
    for module in model.to(device).modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                setattr(module, name, value.to(device))
    return model


def _host_seconds(call: Callable[[], Any], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count


def _device_name(device: str) -> str:
    if device != "cpu":
        module: Any = torch.get_device_module(device)
        return str(module.get_device_name())
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()
