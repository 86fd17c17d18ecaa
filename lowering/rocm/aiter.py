"""mxfp4 on gfx950 through AITER where it is installed: the one place that calls it.

Its ``gemm_a4w4`` reads weights and scales in layouts of its own, which AITER makes. omniq stores
the format's: where a weight comes quantized, ``N * K / 2`` bytes of codes and ``N * K / 32`` of
scales are read and written once more in each call. A bias is added afterwards, because the call
drops it where AITER picks a kernel of Composable Kernel.

Sources: aiter/ops/gemm_op_a4w4.py, aiter/ops/shuffle.py and aiter/utility/fp4_utils.py of
github.com/ROCm/aiter; limits as in vllm/model_executor/kernels/linear/mxfp4/aiter.py of
github.com/vllm-project/vllm.
"""

from __future__ import annotations

import ast
import functools
import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniq_compile.lowering import gpu_quantize
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.lowering.formats import mx
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.rocm.mx import add_bias
from omniq_compile.lowering.schemes import Scheme

ALIGNMENT_N = 32
ALIGNMENT_K = 256

# Rows of scales that AITER shuffles together; it pads to them itself.
SCALE_ROWS = 256

# Wrong results for few rows (github.com/ROCm/aiter/issues/5931).
WRONG_N = 96

_FORMATS = ("mxfp4", "mxfp4_uos")


def unusable() -> str | None:
    """Return why no AITER can be called, or None; without importing it, which would start HIP.

    A package of that name without the operator is another project's.
    """
    spec = find_spec("aiter")
    folders = (spec.submodule_search_locations if spec else None) or ()
    files = (Path(folder, "ops", "gemm_op_a4w4.py") for folder in folders)
    file = next(filter(Path.is_file, files), None)
    if file is None:
        return "AITER is not installed"
    if not _takes_dtype(file):
        return "the installed AITER is older than gemm_a4w4's argument dtype (December 2025)"
    return None


@functools.cache
def _takes_dtype(file: Path) -> bool:
    """Say whether ``gemm_a4w4`` is what is called here: it took a tensor to write to before."""
    return any(
        isinstance(node, ast.FunctionDef)
        and node.name == "gemm_a4w4"
        and {argument.arg for argument in node.args.args} >= {"dtype", "bpreshuffle"}
        for node in ast.parse(file.read_text("utf-8")).body
    )


def _aiter(module: str) -> Any:
    """Import a module of AITER.

    Raises:
        OmniqError: it is not installed, or too old.
    """
    if (why := unusable()) is not None:
        raise OmniqError(
            f"a graph that was lowered with AITER runs on a machine that has it, and here {why}. "
            "Install amd-aiter, or compile on this machine."
        )
    return importlib.import_module(module)


@torch.library.custom_op("omniq::rocm_shuffle_a4w4", mutates_args=())
def rocm_shuffle_a4w4(b: Tensor, b_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Lay a weight out as ``gemm_a4w4`` reads it.

    Args:
        b: packed e2m1, uint8 ``[N, K / 2]``.
        b_scale: e8m0, uint8 ``[N, K / 32]``.

    Returns:
        Codes of the same shape, and scales ``[ceil(N / 256) * 256, K / 32]``.
    """
    codes = _aiter("aiter.ops.shuffle").shuffle_weight(
        b.view(torch.float4_e2m1fn_x2), layout=(16, 16)
    )
    padded = F.pad(b_scale, (0, 0, 0, -b_scale.shape[0] % SCALE_ROWS))
    return codes.view(torch.uint8), _shuffled(padded).view(torch.uint8)


@rocm_shuffle_a4w4.register_fake
def _(b: Tensor, b_scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(b), F.pad(b_scale, (0, 0, 0, -b_scale.shape[0] % SCALE_ROWS))


def _shuffled(scale: Tensor) -> Tensor:
    shuffle = _aiter("aiter.utility.fp4_utils").e8m0_shuffle
    out: Tensor = shuffle(scale.view(torch.float8_e8m0fnu))
    return out


@torch.library.custom_op("omniq::rocm_gemm_a4w4", mutates_args=())
def rocm_gemm_a4w4(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Multiply packed e2m1 codes, each block with its e8m0 scale.

    Args:
        a: uint8 ``[..., M, K / 2]``.
        a_scale: uint8 e8m0 ``[..., M, K / 32]``.
        b, b_scale: of ``[N, K]``, as `rocm_shuffle_a4w4` returns them.

    Returns:
        bfloat16 ``[..., M, N]``.
    """
    if not a.numel():
        return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=torch.bfloat16)
    rows = a.reshape(-1, a.shape[-1]).contiguous()
    scale_rows = a_scale.reshape(-1, a_scale.shape[-1]).contiguous()
    out: Tensor = _aiter("aiter").gemm_a4w4(
        rows.view(torch.float4_e2m1fn_x2),
        b.view(torch.float4_e2m1fn_x2),
        _shuffled(scale_rows),
        b_scale.view(torch.float8_e8m0fnu),
        dtype=torch.bfloat16,
        bpreshuffle=True,
    )
    return out.view(*a.shape[:-1], b.shape[0])


@rocm_gemm_a4w4.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=torch.bfloat16)


def arrange(parts: Parts) -> Parts:
    """Lay a weight ``[N, K]`` out as ``gemm_a4w4`` reads it."""
    codes, scale = torch.ops.omniq.rocm_shuffle_a4w4(*parts)
    return codes, scale


def gemm(
    a: Parts, b: Parts, bias: torch.Tensor | None, problem: Problem, scheme: Scheme
) -> torch.Tensor:
    """Multiply e2m1 codes with their scales; see `Kernel.gemm`."""
    b = b if problem.b_is_weight else arrange(b)
    return add_bias(torch.ops.omniq.rocm_gemm_a4w4(*a, *b), bias)


def refuse(problem: Problem, scheme: Scheme) -> str | None:
    """Return why AITER cannot take a problem, or None."""
    if (why := unusable()) is not None:
        return why
    if scheme.activation != scheme.weight or scheme.weight not in _FORMATS:
        return f"gemm_a4w4 takes e2m1 times e2m1, not {scheme}"
    if problem.b_rank > 2:
        return "gemm_a4w4 takes no batch of matrices"
    if not isinstance(problem.K, int) or mx.padded(problem.K) % ALIGNMENT_K:
        return f"K = {problem.K} in blocks of 32 is not a multiple of {ALIGNMENT_K}"
    if not isinstance(problem.N, int) or problem.N % ALIGNMENT_N:
        return f"N = {problem.N} is not a multiple of {ALIGNMENT_N}"
    if problem.N == WRONG_N:
        return f"gemm_a4w4 is wrong for N = {WRONG_N}"
    if problem.dtype is not torch.bfloat16:
        return f"the result is {str(problem.dtype).removeprefix('torch.')}, not bfloat16"
    return None


GEMM_A4W4 = Kernel(
    name="rocm_mxfp4_aiter_gemm_a4w4",
    method="mxfp4",
    device="rocm",
    archs=("gfx950",),
    native=True,
    about="AITER where it is installed: gemm_a4w4, bias added afterwards; the weight's codes are "
    "shuffled once, or in each call where they are stored",
    quantize=gpu_quantize.quantize,
    gemm=gemm,
    refuse=refuse,
    arrange=arrange,
)
