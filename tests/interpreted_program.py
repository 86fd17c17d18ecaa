"""Runs programs that Inductor generated for a GPU, in Triton's interpreter: a process of its own.

The generated Triton and omniq's own run as they are. The interpreter has no libdevice, which numpy
stands in for; operators of PyTorch run on the CPU. Memory is filled with NaN before it is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import sys
from typing import Any
from unittest.mock import patch

import fake_gemms
import generated_triton
import numpy as np
import torch
from generated_triton import Kernel, blocks

# Small enough that loops and grids have more than one step.
BLOCKS = {"YBLOCK": 8, "ZBLOCK": 2, "R0_BLOCK": 64}

HEADER = """
import triton
import triton.language as tl
from torch._inductor.runtime.triton_helpers import math as tl_math
from interpreted_program import libdevice, triton_helpers
"""

_NUMPY = {"nearbyint": np.rint, "rsqrt": lambda x: 1 / np.sqrt(x)}


def _tensor(data: Any, kind: Any) -> Any:
    from triton.language import core
    from triton.runtime.interpreter import TensorHandle

    shape = [core.constexpr(size) for size in data.shape]
    return core.tensor(TensorHandle(data, kind), core.block_type(kind, shape))


class _Libdevice:
    """Functions of CUDA's libdevice by name, on float32."""

    def __getattr__(self, name: str) -> Any:
        function = _NUMPY.get(name) or getattr(np, name)

        def call(*tensors: Any) -> Any:
            data = function(*(t.handle.data for t in tensors)).astype(np.float32)
            return _tensor(data, tensors[0].handle.dtype)

        return call


class _Helpers:
    """Inductor's helpers; numpy does the reductions, element by element in the interpreter."""

    def __getattr__(self, name: str) -> Any:
        from torch._inductor.runtime import triton_helpers

        return getattr(triton_helpers, name)

    def max2(self, values: Any, axis: int) -> Any:
        return _tensor(values.handle.data.max(axis), values.handle.dtype)


libdevice, triton_helpers = _Libdevice(), _Helpers()


class _Launcher:
    """Stands in for a compiled kernel: ``run`` as the generated program calls it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        module = kernel.load(HEADER)
        self.function = getattr(module, kernel.function)
        self.parameters = self.function.arg_names

    def run(self, *arguments: Any, stream: int) -> None:
        kernel = self.kernel
        arguments = tuple(map(_bytes, arguments))
        # A parameter that is None or 1 is a constant too, and has a place among the arguments.
        if kernel.is_own:
            meta = kernel.meta["inductor_meta"]
            declared = inspect.get_annotations(self.function.fn)
            names = [name for name in self.parameters if name not in declared]
            constants = kernel.constants | kernel.configs[-1]
            more = meta.get("extra_launcher_args", [])
            arguments, last = arguments[: len(names)], arguments[len(names) :]
            symbols = dict(zip(more, last, strict=True))
            if "precomputed_grids" in meta:
                (sizes,) = (
                    grid["python"]
                    for grid in meta["precomputed_grids"]
                    if grid["config"] == kernel.configs[-1]
                )
            else:
                sizes = meta["fixed_grid"]
            grid: Any = tuple(eval(size, {"min": min}, symbols) for size in sizes)
        else:
            sizes = BLOCKS | {"XBLOCK": 4096 if kernel.kind == "pointwise" else 128}
            constants = kernel.constants | blocks(kernel, sizes.__getitem__)
            names = [name for name in self.parameters if not name.endswith("BLOCK")]
            given = dict(zip(names, arguments, strict=True))
            grid = tuple(
                -(-given[f"{axis}numel"] // constants[f"{axis.upper()}BLOCK"])
                for axis in ("x", "y", "z")
                if f"{axis}numel" in given
            )
        self.function[grid](**dict(zip(names, arguments, strict=True)) | constants)


def _bytes(argument: Any) -> Any:
    """Return e8m0 scales as bytes, which the generated kernels take them for."""
    is_e8m0 = isinstance(argument, torch.Tensor) and argument.dtype is torch.float8_e8m0fnu
    return argument.view(torch.uint8) if is_e8m0 else argument


class _Compile:
    """Stands in for `AsyncCompile`."""

    def triton(self, name: str, text: str, **more: Any) -> _Launcher:
        return _Launcher(generated_triton.parse(name, text))

    def wait(self, scope: Any) -> None:
        pass


def _empty(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    """Allocate memory whose every byte is 255: NaN in each float format."""
    out = torch.empty_strided(size, stride, dtype=dtype)
    ctypes.memset(out.data_ptr(), 255, out.untyped_storage().nbytes())
    return out


class _ExternKernels:
    """PyTorch's operators by name; the CPU has no ``_scaled_mm`` with a scale per block."""

    def __getattr__(self, name: str) -> Any:
        from torch._inductor.select_algorithm import extern_kernels

        return getattr(extern_kernels, name)

    def _scaled_mm(
        self, a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any = None, *,
        out_dtype: torch.dtype, use_fast_accum: bool, out: torch.Tensor,
    ) -> None:  # fmt: skip
        if a_scale.dtype is torch.float8_e8m0fnu:
            (M, K), N = a.shape, b.shape[1]
            a_scale, b_scale = _in_rows(a_scale, M, K), _in_rows(b_scale, N, K)
        out.copy_(fake_gemms.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype))


def _in_rows(scale: torch.Tensor, rows: int, K: int) -> torch.Tensor:
    """Undo cuBLAS's "1D Block Scaling Factors Layout" of e8m0 scales: ``[rows, K / 32]``."""
    columns = K // 32
    tiles = scale.view(torch.uint8).view(-(-rows // 128), -(-columns // 4), 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(-1, 4 * tiles.shape[1])
    return plain[:rows, :columns].contiguous().view(scale.dtype)


def _attention(query: Any, key: Any, value: Any) -> tuple[torch.Tensor]:
    return (torch.nn.functional.scaled_dot_product_attention(query, key, value),)


def run(program: str, inputs: list[Any]) -> list[Any]:
    """Call a program on tensors of the CPU; returns its outputs."""
    flash = "torch.ops.aten._scaled_dot_product_flash_attention.default("
    device = "device(type='cuda', index=0)"
    lines = [
        line.replace(flash, "attention(").replace(device, "device(type='cpu')")
        for line in program.splitlines()
        if "_cuda_getCurrentRawStream" not in line and not line.startswith("async_compile = ")
    ]
    scope: dict[str, Any] = {"async_compile": _Compile(), "attention": _attention}
    exec(compile("\n".join(lines), "program", "exec"), scope)
    scope |= {"empty_strided_cuda": _empty, "copy_if_misaligned": lambda tensor: tensor}
    scope |= {"extern_kernels": _ExternKernels()}
    scope |= {"get_raw_stream": lambda index: 0, "assert_alignment": lambda *checked: None}
    with (
        patch("torch.cuda._DeviceGuard", lambda index: contextlib.nullcontext()),
        patch("torch.cuda.set_device", lambda index: None),
    ):
        return list(scope["call"](list(inputs)))


def main(file: str, out: str) -> None:
    """Run the cases of a file, (program, inputs) by name, and write their outputs."""
    from triton_interpreter import patch_interpreter

    assert os.environ["TRITON_INTERPRET"] == "1"
    patch_interpreter()
    cases = torch.load(file, weights_only=False)
    torch.save({name: run(*case) for name, case in cases.items()}, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
