"""Triton's interpreter, with what it lacks to run the GEMMs, and with its addresses checked.

It reads BF16 operands of a product as integers, truncates to BF16 and e4m3 where GPUs round to
nearest, knows no e4m3fnuz, and has no ``dot_scaled`` before Triton 3.8. These are filled in here
with numpy and ml_dtypes, which share no code with omniq.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch


def interpreter_works() -> bool:
    """Say no without Triton, and for 3.6 beside numpy 2.4, which ended how it makes scalars."""
    if find_spec("triton") is None:
        return False
    import numpy
    import triton

    old = numpy.lib.NumpyVersion(numpy.__version__) < "2.4.0"
    return old or bool(triton.__version__ >= "3.7")


def patch_interpreter() -> None:
    """Fill in what the interpreter lacks, see above."""
    import inspect

    import ml_dtypes
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle, dot = interpreter.TensorHandle, builder.create_dot

    def product(a: Any, b: Any, sums: Any) -> Any:
        # Wide enough that the order of the sum is all that differs from a float32 accumulator.
        total = a.astype(np.float64) @ b.astype(np.float64) + sums.data
        return handle(total.astype(np.float32), tl.float32)

    floats = {
        tl.bfloat16: ml_dtypes.bfloat16,
        tl.float8e4nv: ml_dtypes.float8_e4m3fn,
        tl.float8e4b8: ml_dtypes.float8_e4m3fnuz,
    }

    def create_dot(self: Any, a: Any, b: Any, sums: Any, *options: Any) -> Any:
        kind = floats.get(a.dtype.scalar)
        if kind is None:
            return dot(self, a, b, sums, *options)
        return product(*(np.ascontiguousarray(x.data).view(kind) for x in (a, b)), sums)

    def values(codes: Any, scale: Any, element: Any) -> Any:
        """Decode [rows, K] and apply [rows, K / 32], from the definitions of MX v1.0."""
        codes = np.ascontiguousarray(codes).view(np.uint8)
        if element.name == "E2M1":
            pairs = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)
            real = pairs.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        else:
            real = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        power = np.ascontiguousarray(scale).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        return real * np.repeat(power, 32, axis=-1)

    def create_dot_scaled(
        self: Any, a: Any, a_scale: Any, a_element: Any, b: Any, b_scale: Any, b_element: Any,
        fast_math: bool, a_packed: bool, b_packed: bool, sums: Any,
    ) -> Any:  # fmt: skip
        assert a_packed
        assert b_packed
        left = values(a.data, a_scale.data, a_element)
        return product(left, values(b.data.T, b_scale.data, b_element).T, sums)

    if not hasattr(builder, "create_dot_scaled"):
        semantic = type(interpreter.interpreter_semantic)
        dot_scaled = semantic.dot_scaled

        def with_constants(self: Any, *arguments: Any) -> Any:
            return dot_scaled(
                self, *(tl.constexpr(x) if isinstance(x, str) else x for x in arguments)
            )

        semantic.dot_scaled = with_constants
        builder.create_dot_scaled = create_dot_scaled
    tl.float8e4b8.to_ir = lambda builder: tl.float8e4b8
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        return handle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    fp_to_fp = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.float8e4nv):
            return fp_to_fp(self, source, to, rounding)
        return handle(source.data.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), tl.float8e4nv)

    @cache
    def builtins(package: Any) -> list[str]:
        members = inspect.getmembers(package)
        return [name for name, member in members if tl.core.is_builtin(member)]

    def patch_builtin(package: Any, *more: Any) -> None:
        # Each call of a device function looks through the whole language, a third of all time.
        for name in builtins(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *more)

    interpreter._patch_builtin = patch_builtin
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot


def check_addresses() -> None:
    """Fail where a launch of omniq's reads beside its operands or stores beside its result.

    What lies there is not used, so that no result shows it; on a GPU it may be no memory at all.
    """
    from triton.runtime import interpreter

    from omniq_compile.lowering.triton_kernels import launch

    builder = interpreter.InterpreterBuilder
    load, store, run = builder.create_masked_load, builder.create_masked_store, launch.run
    operands: dict[str, torch.Tensor] = {}

    def check(pointers: Any, mask: Any, tensors: Iterable[torch.Tensor]) -> None:
        at = pointers.data[mask.data]
        if at.size:
            first, last = int(at.min()), int(at.max())
            assert any(
                t.data_ptr() <= first <= last <= t.data_ptr() + t.nbytes - t.itemsize
                for t in tensors
            ), "memory beside the operands"

    def checked_load(self: Any, pointers: Any, mask: Any, *options: Any, **named: Any) -> Any:
        check(pointers, mask, operands.values())
        return load(self, pointers, mask, *options, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        check(pointers, mask, [operands["out_ptr"]])
        return store(self, pointers, value, mask, *options)

    def noted_run(launched: Any) -> None:
        found = launched.arguments.items()
        operands.clear()
        operands.update({name: x for name, x in found if isinstance(x, torch.Tensor)})
        run(launched)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    launch.run = noted_run
