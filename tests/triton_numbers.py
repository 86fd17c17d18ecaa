"""Rows of Triton GEMMs in Triton's interpreter: a process of its own, which numbers tests call."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton_interpreter import check_addresses, patch_interpreter

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
        if self.tile is None:
            return name
        return f"{name}-persistent" if self.tile.persistent else f"{name}-grouped"

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
# Five rows of tiles, two side by side: two groups and one that is smaller.
_GROUPED = Tile(16, 64, 128, 4, 3, group_m=2)
_MXFP4, _DUAL = get_scheme("mxfp4"), get_scheme("mxfp4_dualscale")
CASES = (
    Case("cuda:sm_80", "cuda_s8_triton", get_scheme("int8"), (37,), 205, 83),
    Case("cuda:sm_90", "cuda_s8_triton", get_scheme("int8"), (2, 67), 256, 150, BF16),
    Case("cuda:sm_100", "cuda_s8_triton", get_scheme("int8"), (5,), 96, 70, FP16, bias=False),
    Case("cuda:sm_90", "cuda_s8_triton", get_scheme("int8"), (2, 70), 272, 301, tile=_PERSISTENT),
    Case("cuda:sm_90", "cuda_fp8_triton", get_scheme("fp8"), (270,), 144, 200, BF16, False,
         _PERSISTENT),
    Case("cuda:sm_80", "cuda_s8_triton", get_scheme("int8"), (75,), 205, 150, tile=_GROUPED),
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
    Case("cuda:sm_90", "cuda_mxfp4_decoded_triton", get_scheme("mxfp4", activation_scheme="none"),
         (19,), 224, 83, BF16),
    Case("cuda:sm_80", "cuda_mxfp4_dualscale_decoded_triton",
         get_scheme("mxfp4_dualscale", activation_scheme="none"), (37,), 1088, 83, BF16),
    # K is whole steps of 128, and what shares a scale is not.
    Case("cuda:sm_80", "cuda_fp8_weight_only_triton", _blocks(96, 96), (19,), 384, 83, FP16),
)  # fmt: skip


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


def _check_offsets_of_64_bits() -> None:
    """Compute the last tile where a and the result have more than 2**31 elements each.

    Of their memory only the last rows are touched.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from omniq_compile.lowering.triton_kernels import launch, tiles

    before = 1 << 24
    programs: list[int] = []

    def one_program(launched: launch.Launch, constants: Any) -> int:
        M, N = (launched.arguments[name] for name in ("M", "N"))
        programs.append(tiles.count(M, N, constants["BLOCK_M"], constants["BLOCK_N"]))
        return 1

    def last_program(self: Any, axis: int) -> Any:
        at = np.array([programs[-1] - 1], dtype=np.int32)
        return interpreter.TensorHandle(at, tl.int32)

    def below_others(part: torch.Tensor) -> torch.Tensor:
        long = part.new_empty((before + part.shape[0], *part.shape[1:]))
        long[before:] = part
        return long

    for name in ("s8", "fp8_block", "mxfp8", "mxfp8_decoded"):
        case = next(case for case in CASES if case.kernel == f"cuda_{name}_triton")
        case = replace(case, rows=(37,), K=160, N=129, dtype=BF16, tile=None)
        with _Calls() as calls:
            expected = _run(case, finite=True)
        ((operator, arguments),) = calls.seen
        given = dict(zip((a.name for a in operator._schema.arguments), arguments, strict=True))
        given |= {n: tree_map(below_others, given[n]) for n in ("a", "a_scale") if n in given}
        with (
            mock.patch.object(launch.Launch, "programs", one_program),
            mock.patch.object(
                interpreter.InterpreterBuilder, "create_get_program_id", last_program
            ),
        ):
            out = operator(**given)
        # The last tile has one column.
        torch.testing.assert_close(out[before:, 128:], expected[:, 128:], rtol=2**-7, atol=0)


def every_code(element: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every code beside every e8m0 scale, ``[256, n]``, and its value in float64.

    It is a zero in place of what is no normal number of float32.
    """
    import ml_dtypes
    import numpy as np

    names = {"e4m3": ml_dtypes.float8_e4m3fn, "e2m1": ml_dtypes.float4_e2m1fn}
    codes = np.arange(256, dtype=np.uint8).reshape(1, -1)
    codes = codes if element == "e4m3" else codes[:, :32] % 16
    scale = np.arange(256, dtype=np.uint8).reshape(-1, 1).view(ml_dtypes.float8_e8m0fnu)
    with np.errstate(invalid="ignore"):
        exact = codes.view(names[element]).astype(np.float64) * scale.astype(np.float64)
    normal = (np.abs(exact) >= 2.0**-126) & (np.abs(exact) < 2.0**128)
    codes, exact = np.where(normal, codes, 0), np.where(normal, exact, 0)
    exact[255] = np.nan
    return torch.from_numpy(codes), torch.from_numpy(exact)


def _decode_every_code(element: str) -> torch.Tensor:
    """Multiply `every_code` by ones on a diagonal."""
    from omniq_compile.lowering.triton_kernels import ops

    codes = every_code(element)[0]
    count = codes.shape[1]
    stored = codes.view(torch.float8_e4m3fn)
    if element == "e2m1":
        stored = codes[:, ::2] | codes[:, 1::2] << 4
    byte = torch.arange(256, dtype=torch.uint8).unsqueeze(1).repeat(1, count // 32)
    ones = [torch.eye(count, dtype=BF16)]
    return ops.decoded_gemm(ones, stored, byte, None, None, FP32, 1, 0).t()


def main(out: str, part: int, parts: int) -> None:
    """Write the results of every ``parts``-th case, by its name."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    patch_interpreter()
    check_addresses()
    if part == 0:
        _check_operators()
    else:
        _check_offsets_of_64_bits()
    results = {str(case): _run(case) for case in CASES[part::parts]}
    if part == 0:
        results |= {element: _decode_every_code(element) for element in ("e4m3", "e2m1")}
    torch.save(results, out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
