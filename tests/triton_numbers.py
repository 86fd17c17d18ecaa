"""Rows of Triton GEMMs run in Triton's interpreter: a process of its own, which numbers tests call.

The interpreter reads BF16 operands of a product as integers, truncates to BF16 and e4m3 where GPUs
round to nearest, knows no e4m3fnuz, and has no ``dot_scaled`` before Triton 3.8. These are filled
in here with numpy and ml_dtypes, which share no code with omniq.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.registry import Kernel, Problem, candidates
from omniq_compile.lowering.schemes import Scheme, get_scheme, w4a8
from omniq_compile.lowering.target import Target
from omniq_compile.lowering.triton_kernels.tiles import Tile

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One row on one target, and a problem ``[*rows, K] x [N, K]``, all sizes different.

    ``tile`` is computed with in place of the chosen one.
    """

    target: str
    kernel: str
    scheme: Scheme
    rows: tuple[int, ...]
    K: int
    N: int
    dtype: torch.dtype = FP32
    bias: bool = True
    tile: Tile | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        formats = f"{self.scheme.activation}-{self.scheme.weight}"
        name = f"{self.target}-{self.kernel}-{formats}-{self.rows}x{self.K}x{self.N}-{dtype}"
        return f"{name}-persistent" if self.tile else name

    @property
    def problem(self) -> Problem:
        M = math.prod(self.rows)
        return Problem(M, self.K, self.N, len(self.rows) + 1, 2, self.dtype)

    @property
    def has_special_rows(self) -> bool:
        """Whether there is room for a row of zeros, one with NaN and one with Inf."""
        return math.prod(self.rows) > 4

    @property
    def row(self) -> Kernel:
        named = candidates(self.scheme.method, Target.parse(self.target))
        return next(kernel for kernel in named if kernel.name == self.kernel)

    def operands(self) -> tuple[torch.Tensor, Any, torch.Tensor | None]:
        """Return x with `has_special_rows`, the weight's parts, and the bias."""
        generator = torch.Generator().manual_seed(self.K * self.N)
        x = torch.randn(*self.rows, self.K, generator=generator)
        x *= torch.randn(*self.rows, 1, generator=generator).exp2()
        flat = x.view(-1, self.K)
        if self.has_special_rows:
            flat[1], flat[2, 3], flat[4, self.K - 1] = 0, torch.nan, torch.inf
        w = torch.randn(self.N, self.K, generator=generator)
        w[self.N // 2] = 0
        bias = torch.randn(self.N, generator=generator).to(BF16) if self.bias else None
        real = FP32 if self.dtype is FP32 else self.dtype
        return x.to(real), get_format(self.scheme.weight).quantize(w.to(BF16)), bias


def _blocks(rows: int, columns: int) -> Scheme:
    return get_scheme("fp8", weight_block_size=(rows, columns))


# Nine tiles or more for four processors.
_PERSISTENT = Tile(64, 128, 128, 4, 3, persistent=True)
_MXFP4, _DUAL = get_scheme("mxfp4"), get_scheme("mxfp4_dualscale")
CASES = (
    Case("cuda:sm_80", "cuda_s8_triton", get_scheme("int8"), (37,), 205, 83),
    Case("cuda:sm_90", "cuda_s8_triton", get_scheme("int8"), (2, 67), 256, 150, BF16),
    Case("cuda:sm_100", "cuda_s8_triton", get_scheme("int8"), (5,), 96, 70, FP16, bias=False),
    Case("cuda:sm_90", "cuda_s8_triton", get_scheme("int8"), (2, 70), 272, 301, tile=_PERSISTENT),
    Case("cuda:sm_90", "cuda_fp8_triton", get_scheme("fp8"), (270,), 144, 200, BF16, False,
         _PERSISTENT),
    Case("cuda:sm_89", "cuda_fp8_triton", get_scheme("fp8"), (2, 21), 203, 83),
    Case("cuda:sm_90", "cuda_fp8_triton", get_scheme("fp8"), (150,), 384, 70, BF16),
    Case("rocm:gfx942", "rocm_fp8_triton", get_scheme("fp8"), (37,), 203, 83, FP16, bias=False),
    Case("rocm:gfx1201", "rocm_fp8_triton", get_scheme("fp8"), (2, 21), 203, 83, BF16),
    Case("rocm:gfx1100", "rocm_s8_triton", get_scheme("int8"), (37,), 205, 83),
    Case("rocm:gfx1100", "rocm_fp8_weight_only_triton", get_scheme("fp8"), (37,), 203, 83, FP16),
    Case("cuda:sm_89", "cuda_fp8_block_triton", _blocks(128, 128), (37,), 450, 200),
    Case("cuda:sm_90", "cuda_fp8_block_triton", _blocks(48, 96), (140,), 301, 171, BF16),
    Case("cuda:sm_120", "cuda_fp8_block_triton", _blocks(1, 320), (2, 9), 650, 83, bias=False),
    Case("rocm:gfx942", "rocm_fp8_block_triton", _blocks(96, 256), (37,), 450, 200),
    Case("cuda:sm_120", "cuda_mxfp8_triton", get_scheme("mxfp8"), (2, 18), 203, 83),
    Case("cuda:sm_100", "cuda_mxfp4_triton", _MXFP4, (37,), 555, 83),
    Case("rocm:gfx950", "rocm_mxfp4_triton", get_scheme("mxfp4", 2), (270,), 512, 83, BF16),
    Case("cuda:sm_100", "cuda_mxfp4_triton", w4a8(_MXFP4), (37,), 203, 83, FP16, bias=False),
    Case("cuda:sm_120", "cuda_mxfp4_dualscale_triton", _DUAL, (37,), 1101, 83),
    Case("rocm:gfx950", "rocm_mxfp4_dualscale_triton", _DUAL, (2, 66), 1024, 70, BF16),
    Case("cuda:sm_90", "cuda_mxfp8_decoded_triton", get_scheme("mxfp8"), (2, 18), 203, 83),
    Case("rocm:gfx942", "rocm_mxfp4_decoded_triton", _MXFP4, (37,), 555, 83, BF16),
    Case("cuda:sm_120", "cuda_mxfp4_decoded_triton", w4a8(_MXFP4), (19,), 203, 83),
    Case("cuda:sm_80", "cuda_mxfp4_decoded_triton", _MXFP4, (150,), 203, 83, FP16, bias=False),
    Case("cuda:sm_80", "cuda_mxfp4_dualscale_decoded_triton", _DUAL, (37,), 1101, 83),
    Case("cuda:sm_90", "cuda_mxfp4_dualscale_decoded_triton", _DUAL, (140,), 1101, 83, BF16),
    Case("cuda:sm_90", "cuda_s8_triton", get_scheme("int8"), (1,), 1205, 83, BF16),
    Case("cuda:sm_90", "cuda_fp8_few_tiles_triton", get_scheme("fp8"), (1, 1), 1024, 70),
    Case("cuda:sm_90", "cuda_mxfp8_decoded_triton", get_scheme("mxfp8"), (1,), 1205, 83),
    Case("cuda:sm_90", "cuda_mxfp4_decoded_triton", _MXFP4, (1, 1), 1205, 83, FP16, bias=False),
    Case("cuda:sm_90", "cuda_mxfp4_dualscale_decoded_triton", _DUAL, (1,), 1205, 83, BF16),
    Case("cuda:sm_80", "cuda_fp8_weight_only_triton", get_scheme("fp8"), (2, 9), 203, 83, BF16),
    Case("cuda:sm_80", "cuda_fp8_weight_only_triton", get_scheme("fp8"), (140,), 203, 83, FP16),
    Case("cuda:sm_80", "cuda_fp8_weight_only_triton", _blocks(96, 96), (37,), 301, 200, BF16),
)  # fmt: skip


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


def _run(case: Case, finite: bool = False) -> torch.Tensor:
    from omniq_compile.lowering.triton_kernels import launch, tiles

    arch = Target.parse(case.target).arch
    launch.device_of = lambda device: launch.Device(arch, processors=4)
    launch.choose = (lambda *sizes: case.tile) if case.tile else tiles.choose
    x, weight, bias = case.operands()
    x = x.nan_to_num(1, 1) if finite else x
    assert case.row.refuse(case.problem, case.scheme) is None
    a = case.row.quantize(x, case.scheme.activation)
    return case.row.gemm(a, weight, bias, case.problem, case.scheme)


class _Calls(TorchDispatchMode):
    """Notes the calls of Triton operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("omniq.triton_"):
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def _with_gaps(operand: Any) -> Any:
    """Return the same values, every second one of their memory."""
    if not isinstance(operand, torch.Tensor):
        return operand
    byte = operand.view(torch.uint8) if operand.itemsize == 1 else operand
    return byte.repeat_interleave(2, -1)[..., ::2].view(operand.dtype)


def _check_operators() -> None:
    """Check each operator's fake, and traces of it with symbolic sizes, as PyTorch does.

    And that operands of any strides are read as they are.
    """
    for name in ("s8", "fp8_block", "mxfp8", "mxfp8_decoded"):
        case = next(case for case in CASES if case.kernel == f"cuda_{name}_triton")
        with _Calls() as calls:
            _run(case, finite=True)
        ((operator, arguments),) = calls.seen
        tests = ("test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, arguments, test_utils=tests)
        assert torch.equal(operator(*tree_map(_with_gaps, arguments)), operator(*arguments))


def main(out: str, part: int, parts: int) -> None:
    """Write the results of every ``parts``-th case, by its name."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    patch_interpreter()
    if part == 0:
        _check_operators()
    torch.save({str(case): _run(case) for case in CASES[part::parts]}, out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
