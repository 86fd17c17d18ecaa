"""Registers the devices of device.cpp as ``npu``, and a `torch_npu` that computes on them.

A process has one kind of accelerator, and cannot get rid of it: `install` is for a process of its
own. Diffusers, accelerate and omniq take what it makes for an Ascend NPU, with torch_npu installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_torch_npu
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from omniq_compile.lowering.cpu import library


def install() -> None:
    """Make ``npu:0`` and ``npu:1``, and torch_npu, whose operators are those of Ascend 950."""
    built = library.build(Path(__file__).with_name("device.cpp").read_text())
    torch.utils.rename_privateuse1_backend("npu")
    torch._register_device_module("npu", _device_module(built))
    torch.utils.generate_methods_for_privateuse1_backend()
    sys.modules["torch_npu"] = _torch_npu()


def _device_module(built: ctypes.CDLL) -> ModuleType:
    built.memory_allocated.restype = built.max_memory_allocated.restype = ctypes.c_int64

    @contextlib.contextmanager
    def stream(which: Any) -> Iterator[None]:
        with contextlib.nullcontext() if which is None else which:
            yield

    module: Any = ModuleType("torch.npu")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 2
    module.current_device = built.current
    module.set_device = lambda device: built.make_current(torch.device("npu", device).index)
    module.device = lambda device: torch.accelerator.device_index(device.index)
    module.get_device_name = lambda device=None: "Ascend950PR"
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.is_bf16_supported = lambda: True
    module.synchronize = lambda device=None: None
    module.memory_allocated = lambda device=None: built.memory_allocated()
    module.max_memory_allocated = lambda device=None: built.max_memory_allocated()
    module.reset_peak_memory_stats = lambda device=None: built.reset_peak_memory_stats()
    module.mem_get_info = lambda device=None: (2**33, 2**33)
    module.empty_cache = lambda: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = module.manual_seed = module.manual_seed_all = lambda *_: None
    module.Stream, module.stream = torch.Stream, stream
    module.Event = lambda enable_timing=False: torch.Event("npu", enable_timing=enable_timing)
    module.current_stream = torch.accelerator.current_stream
    return module  # type: ignore[no-any-return]


def _torch_npu() -> ModuleType:
    module, _ = fake_torch_npu.install("ascend950")
    module.__spec__ = ModuleSpec("torch_npu", None)  # by which libraries find it
    for name in fake_torch_npu.OPERATORS:
        setattr(module, name, _on_device(getattr(module, name)))
    # What diffusers' own layers call on NPUs.
    for name in ("npu_rms_norm", "npu_geglu"):
        setattr(module, name, getattr(torch.ops.host_npu, name))
    module.npu_fusion_attention = None  # type: ignore[attr-defined]
    return module


def _on_device(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse operands that are not all on one NPU, as the operator would; compute on the host."""

    def operator(*args: Any, **kwargs: Any) -> Any:
        devices = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        assert len(devices) == 1, f"operands on {devices}"
        (device,) = devices
        assert device.type == "npu", f"operands on {device}"
        args, kwargs = tree_map_only(Tensor, partial(_moved, to="cpu"), (args, kwargs))
        return tree_map_only(Tensor, partial(_moved, to=device), compute(*args, **kwargs))

    return operator


def _moved(x: Tensor, to: Any) -> Tensor:
    moved = x.to(to)
    if hasattr(x, "npu_format"):
        moved.npu_format = x.npu_format  # type: ignore[attr-defined]
    return moved


@torch.library.custom_op("host_npu::npu_rms_norm", mutates_args=())
def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    reciprocal = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return (x.float() * reciprocal).to(x.dtype) * gamma, reciprocal


@_rms_norm.register_fake
def _(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("host_npu::npu_geglu", mutates_args=())
def _geglu(x: Tensor, dim: int = -1, approximate: int = 1) -> tuple[Tensor, Tensor]:
    value, gate = x.chunk(2, dim)
    gelu = F.gelu(gate, approximate="tanh" if approximate else "none")
    return value * gelu, gelu


@_geglu.register_fake
def _(x: Tensor, dim: int = -1, approximate: int = 1) -> tuple[Tensor, Tensor]:
    value, _ = x.chunk(2, dim)
    return torch.empty_like(value.contiguous()), torch.empty_like(value.contiguous())
