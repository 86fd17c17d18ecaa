"""Lets Inductor generate code for an NVIDIA GPU on a machine without one.

Inductor traces, fuses and prints with fake tensors. What it asks the device for on the way, which
is mostly what kind of GPU it is, is answered here. Everything replaced is private to PyTorch and
Triton, checked on torch 2.11 to 2.15, and put back at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from omniq_compile.lowering.cpu import library
from omniq_compile.lowering.target import Target
from omniq_compile.lowering.triton_kernels import launch
from omniq_compile.lowering.triton_kernels.launch import Device

DEVICE = torch.device("cuda", 0)

# A GPU of each architecture: its name, its SMs, and the threads that one holds (NVIDIA's
# architecture whitepapers; CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"). Inductor sizes reductions by them, and omniq its tiles.
_GPUS = {
    "sm_80": ("A100", 108, 2048),
    "sm_89": ("L40S", 142, 1536),
    "sm_90": ("H100 SXM", 132, 2048),
    "sm_100": ("B200", 148, 2048),
    "sm_120": ("RTX 5090", 170, 1536),
}


def why_not(target: Target) -> str | None:
    """Return why no code can be generated for a target that is not here, or None."""
    if target.arch not in _GPUS:
        return f"Inductor generates code for {target} only where there is one"
    if torch.cuda.is_available():
        return "this machine has a GPU, and Inductor generates code for models that are on it"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'omniq-compile[triton]'"
    return _link()


@cache
def _link() -> str | None:
    """Let fake tensors be on "cuda", in this process; returns why that cannot be, or None.

    A build of torch for CPUs refuses to index them, as nothing in it switches between GPUs.
    """
    torch._C._ensureCUDADeviceGuardSet()  # for builds with CUDA, on a machine without GPU
    if _can_index():
        return None
    c10 = Path(torch.__file__).parent / "lib" / "libc10.so"
    try:
        ctypes.CDLL(str(c10), mode=ctypes.RTLD_GLOBAL)
        library.build(_GUARD)
    except Exception as error:  # whatever the compiler, the linker or the file system says
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"that needs a C++ compiler, and building failed: {first}"
    return None if _can_index() else "this build of torch cannot index tensors of a GPU"


def _can_index() -> bool:
    with FakeTensorMode():
        tensor = torch.empty(1, device=DEVICE)
        try:
            return tensor[0:1].shape == (1,)
        except RuntimeError:
            return False


_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""


def moved(gm: fx.GraphModule, inputs: list[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """Return a copy of a graph whose tensors are on the GPU, and its inputs there.

    Args:
        gm: a graph that was traced on the CPU. Attention is replaced by the operator that
            PyTorch chooses when it runs.
        inputs: its fake tensors and sizes.
    """

    def put(value: Any) -> Any:
        on_gpu = tree_map_only(torch.device, lambda d: DEVICE if d.type == "cpu" else d, value)
        return "cuda" if on_gpu == "cpu" else on_gpu

    def copied(gm: fx.GraphModule) -> fx.GraphModule:
        # Not `dynamo.copy_graph`, whose copy passes for a graph of Dynamo's and needs its sources.
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        copy = fx.GraphModule(gm, graph)
        for node in graph.nodes:
            node.args = tuple(map(put, node.args))
            node.kwargs = {name: put(value) for name, value in node.kwargs.items()}
            if node.target is functional.scaled_dot_product_attention:
                node.target = _attention
        for name, called in copy.named_children():
            if isinstance(called, fx.GraphModule):  # such as a branch of `torch.cond`
                setattr(copy, name, copied(called))
        copy.recompile()
        return copy

    mode = next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), FakeTensorMode())
    with mode:
        return copied(gm), tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), inputs)


@contextlib.contextmanager
def present(target: Target) -> Iterator[None]:
    """Answer what Inductor asks about a GPU as one of the target would."""
    import triton
    from torch._dynamo import device_interface
    from torch._inductor import scheduler
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    name, processors, threads = _GPUS[target.arch]
    capability = divmod(int(target.arch.removeprefix("sm_")), 10)
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=processors,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=threads,
        max_threads_per_block=1024, warp_size=32, total_memory=80 << 30, gcnArchName="",
    )  # fmt: skip
    device_interface.get_interface_for_device("cpu")  # fills the table
    gpu = _interface(device_interface.CudaInterface, properties)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: DEVICE,
    )
    fold = UniformValueConstantFolder._deduce_value

    def fold_on_cpu(folder: Any, node: fx.Node) -> Any:
        with _OnCpu():  # type: ignore[no-untyped-call]
            return fold(folder, node)

    properties_of: Any = DeviceProperties.create
    with contextlib.ExitStack() as stack:
        for owner, attribute, value in (
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "get_device_capability", lambda device=None: capability),
            (triton.runtime.driver, "_active", driver),
            (scheduler, "has_triton", lambda *_: True),
            (UniformValueConstantFolder, "_deduce_value", fold_on_cpu),
            (launch, "device_of", lambda device: Device(target.arch, processors)),
        ):
            stack.enter_context(_replaced(owner, attribute, value))
        interfaces = device_interface.device_interfaces
        stack.callback(interfaces.update, dict(interfaces))
        stack.callback(interfaces.pop, str(DEVICE), None)
        interfaces.update({DEVICE.type: gpu, str(DEVICE): gpu})
        properties_of.__func__.cache_clear()
        stack.callback(properties_of.__func__.cache_clear)
        yield


@contextlib.contextmanager
def _replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


def _interface(base: Any, properties: Any) -> Any:
    class Worker:
        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda device: None)
        get_device_properties = staticmethod(lambda device=None: properties)

    capability = 10 * properties.major + properties.minor
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "synchronize": None,
        "get_device_properties": properties, "get_compute_capability": capability,
        "is_bf16_supported": True, "is_triton_capable": True, "raise_if_triton_unavailable": None,
        "memory_allocated": 0,
    }  # fmt: skip
    functions = {
        name: staticmethod(lambda *args, _answer=answer, **kwargs: _answer)
        for name, answer in answers.items()
    }
    return type("AbsentGpu", (base,), {"Worker": Worker, **functions})


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Call the kernel that PyTorch chooses on these GPUs, but for cuDNN's (sdp_utils.cpp)."""
    aten = torch.ops.aten
    fused = query.dtype in (torch.bfloat16, torch.float16) and not enable_gqa
    if not fused or query.shape[-1] % 8 or query.shape[-1] > 256:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
            attn_mask.logical_not(), float("-inf")
        )
    bias = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, False, dropout_p, is_causal, scale=scale
    )[0]


class _OnCpu(TorchDispatchMode):
    """Computes constants on the CPU, which Inductor does on the GPU to fold them."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        return function(*args, **kwargs or {})
