"""torch_npu's operators as ``omniq::npu_*``: the one place that calls them.

torch_npu is imported by the first call that runs, so that graphs for NPUs are traced, lowered and
printed anywhere. Every operator takes and returns the parts that omniq's formats define; what
torch_npu wants instead is made here:

* Activations are joined to ``[M, K]``, because a scale per token is 1-D for ``npu_quant_matmul``.
* A weight stays ``[N, K]`` and is handed over as its transposed view; packed e2m1 could not be
  laid out otherwise (two codes of a byte are neighbours along K).
* e8m0 scales are ``[rows, ceil(K / 64), 2]``: a view of ``[rows, K / 32]`` where that is even, else
  a copy with one column of zeros.
* ``npu_dual_level_quant_matmul`` wants its second matrix as FRACTAL_NZ and its coarse scales as
  ``[ceil(K / 512), N]``. Of a weight that comes quantized, both are made in each call, which reads
  and writes ``N * K / 2`` bytes of codes and ``N * K / 128`` of scales once more.

Sources: schemas in npu_native_functions_by_codegen.yaml of torch_npu 2.13.0; layouts and dtypes in
docs/zh/custom_APIs of github.com/Ascend/op-plugin, and in gitcode.com/cann/ops-nn
(aclnnQuantMatmulV5, aclnnDualLevelQuantMatmulWeightNz, aclnnDynamicDualLevelMxQuant).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniq_compile.lowering.errors import OmniqError
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.formats.blocks import pad_last
from omniq_compile.lowering.formats.mx import BLOCK
from omniq_compile.lowering.npu.limits import DTYPES

# What amax may be of e2m1's scale before that is doubled; see `formats.mx.block_scale`.
UOS_MAX = 7.25

# The code of Ascend's fractal layout (ACL_FORMAT_FRACTAL_NZ).
FRACTAL_NZ = 29


def _torch_npu() -> Any:
    """Import torch_npu.

    Raises:
        OmniqError: it is not installed.
    """
    try:
        return importlib.import_module("torch_npu")
    except ModuleNotFoundError as error:
        if error.name != "torch_npu":
            raise
        raise OmniqError(
            "a graph that was lowered for an Ascend NPU runs through torch_npu, which is not "
            "installed here. Install the torch_npu of your torch version on a machine with an NPU, "
            "or lower for this machine: leave out the option 'target'."
        ) from error


@torch.library.custom_op("omniq::npu_dynamic_quant", mutates_args=())
def npu_dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row: ``x [..., K]`` -> int8 ``[..., K]`` and float32 scale ``[...]``.

    The scale is amax / 127. How a tie is rounded is the operator's own choice. ``x`` is bfloat16 or
    float16; another dtype becomes bfloat16.
    """
    if not x.numel():
        codes, scale = get_format("int8").allocate(x)
        return codes, scale
    codes, scale = _torch_npu().npu_dynamic_quant(_values(x))
    return codes.view(x.shape), scale.view(x.shape[:-1])


@npu_dynamic_quant.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = get_format("int8").allocate(x)
    return codes, scale


@torch.library.custom_op("omniq::npu_quant_matmul", mutates_args=())
def npu_quant_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply int8 codes, apply both scales, add the bias and round once.

    Args:
        a: int8 ``[..., M, K]``.
        a_scale: float32 ``[..., M]``.
        b: int8 ``[N, K]``.
        b_scale: float32 ``[N]``.
        bias: ``[N]`` of any float dtype, or None. It is passed on in the result's dtype, or else in
            float32, which is what the operator takes beside a scale per token.
        dtype: of the result ``[..., M, N]``, bfloat16 or float16.
    """
    if not a.numel():
        return _result_like(a, b, dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(torch.float32)
    out = _torch_npu().npu_quant_matmul(
        _rows(a),
        b.t(),
        b_scale,
        pertoken_scale=a_scale.reshape(-1),
        bias=bias,
        output_dtype=dtype,
    )
    return _restore(out, a)


@npu_quant_matmul.register_fake
def _(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _result_like(a, b, dtype)


@torch.library.custom_op("omniq::npu_dynamic_mx_quant", mutates_args=())
def npu_dynamic_mx_quant(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Quantize blocks of 32 along K, which is padded to whole blocks first.

    Args:
        x: ``[..., K]``, bfloat16 or float16; another dtype becomes bfloat16.
        format: ``"mxfp8"``, ``"mxfp4"`` or ``"mxfp4_uos"``.

    Returns:
        codes and e8m0 scale, as that format defines them.
    """
    if not x.numel():
        codes, scale = get_format(format).allocate(x)
        return codes, scale
    npu = _torch_npu()
    options: dict[str, Any] = {"dst_type": npu.float4_e2m1fn_x2, "scale_alg": 0}
    if format == "mxfp8":
        options["dst_type"] = npu.float8_e4m3fn
    elif format == "mxfp4_uos":
        options |= {"scale_alg": 2, "dst_type_max": UOS_MAX}
    rows = pad_last(_values(x), BLOCK)
    codes, scale = npu.npu_dynamic_mx_quant(
        rows, axis=-1, round_mode="rint", block_size=BLOCK, **options
    )
    return codes.view(*x.shape[:-1], -1), _unpaired(scale, rows, x)


@npu_dynamic_mx_quant.register_fake
def _(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    codes, scale = get_format(format).allocate(x)
    return codes, scale


@torch.library.custom_op("omniq::npu_mx_quant_matmul", mutates_args=())
def npu_mx_quant_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply MX codes, each block with its e8m0 scale, add the bias and round once.

    Args:
        a: e4m3 ``[..., M, K]`` or packed e2m1 (uint8) ``[..., M, K / 2]``.
        a_scale: uint8 e8m0 ``[..., M, K / 32]``.
        b, b_scale: the same of ``[N, K]``. e4m3 goes with e4m3; e2m1 with either.
        bias: ``[N]`` of any float dtype, or None. It is passed on in float32, and as ``[1, N]`` in
            the result's dtype for e4m3 times e2m1.
        dtype: of the result ``[..., M, N]``: bfloat16 or float16, and bfloat16 alone for e4m3 times
            e2m1.
    """
    if not a.numel():
        return _result_like(a, b, dtype)
    npu = _torch_npu()
    mixed = a.dtype is not b.dtype
    options: dict[str, Any] = {}
    if a.dtype is torch.uint8:
        options["x1_dtype"] = npu.float4_e2m1fn_x2
    if b.dtype is torch.uint8:
        options["x2_dtype"] = npu.float4_e2m1fn_x2
    if bias is not None:
        bias = bias.to(dtype).unsqueeze(0) if mixed else bias.to(torch.float32)
    out = npu.npu_quant_matmul(
        _rows(a),
        b.t(),
        _paired(b_scale).transpose(0, 1),
        pertoken_scale=_paired(_rows(a_scale)),
        bias=bias,
        output_dtype=dtype,
        pertoken_scale_dtype=npu.float8_e8m0fnu,
        scale_dtype=npu.float8_e8m0fnu,
        group_sizes=[0, 0, BLOCK] if mixed else [1, 1, BLOCK],
        **options,
    )
    return _restore(out, a)


@npu_mx_quant_matmul.register_fake
def _(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _result_like(a, b, dtype)


@torch.library.custom_op("omniq::npu_dynamic_dual_level_mx_quant", mutates_args=())
def npu_dynamic_dual_level_mx_quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize runs of 512 and blocks of 32 along K, which is padded to whole blocks first.

    The operator rounds ``x / coarse`` to x's dtype before it quantizes that, and omniq's format
    does not: a code may differ by one step from what `formats.mxfp4_dualscale` gives.

    Args:
        x: ``[..., K]``, bfloat16 or float16; another dtype becomes bfloat16.

    Returns:
        codes, e8m0 scale and coarse scale, as the format ``mxfp4_dualscale`` defines them.
    """
    if not x.numel():
        codes, scale, coarse = get_format("mxfp4_dualscale").allocate(x)
        return codes, scale, coarse
    rows = pad_last(_values(x), BLOCK)
    codes, coarse, scale = _torch_npu().npu_dynamic_dual_level_mx_quant(rows, round_mode="rint")
    shape = x.shape[:-1]
    return codes.view(*shape, -1), _unpaired(scale, rows, x), coarse.view(*shape, -1)


@npu_dynamic_dual_level_mx_quant.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, coarse = get_format("mxfp4_dualscale").allocate(x)
    return codes, scale, coarse


@torch.library.custom_op("omniq::npu_dual_level_arrange", mutates_args=())
def npu_dual_level_arrange(b: Tensor, b_coarse: Tensor) -> tuple[Tensor, Tensor]:
    """Lay a second matrix out as `npu_dual_level_quant_matmul` reads it.

    Args:
        b: packed e2m1 (uint8) ``[N, K / 2]``.
        b_coarse: float32 ``[N, ceil(K / 512)]``.

    Returns:
        The codes, int8 of the same shape as FRACTAL_NZ, and ``[ceil(K / 512), N]``.
    """
    codes = b.contiguous().view(torch.int8)  # what ordinary operations quantized may be transposed
    fractal = _torch_npu().npu_format_cast(codes, FRACTAL_NZ, customize_dtype=torch.int8)
    return fractal, b_coarse.t().clone(memory_format=torch.contiguous_format)


@npu_dual_level_arrange.register_fake
def _(b: Tensor, b_coarse: Tensor) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape, dtype=torch.int8), b_coarse.new_empty(b_coarse.shape[::-1])


@torch.library.custom_op("omniq::npu_dual_level_quant_matmul", mutates_args=())
def npu_dual_level_quant_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_coarse: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_coarse: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply e2m1 codes with both levels of their scales, add the bias and round once.

    Args:
        a: packed e2m1 (uint8) ``[..., M, K / 2]``.
        a_scale: uint8 e8m0 ``[..., M, K / 32]``.
        a_coarse: float32 ``[..., M, ceil(K / 512)]``.
        b, b_coarse: of ``[N, K]``, as `npu_dual_level_arrange` returns them.
        b_scale: uint8 e8m0 ``[N, K / 32]``.
        bias: ``[N]`` of any float dtype, or None; passed on in float32.
        dtype: of the result ``[..., M, N]``, bfloat16 or float16.
    """
    if not a.numel():
        return _result_like(a, b, dtype)
    out = _torch_npu().npu_dual_level_quant_matmul(
        _rows(a),
        b,
        _rows(a_coarse),
        b_coarse,
        _paired(_rows(a_scale)),
        _paired(b_scale),
        bias=None if bias is None else bias.to(torch.float32),
        output_dtype=dtype,
    )
    return _restore(out, a)


@npu_dual_level_quant_matmul.register_fake
def _(
    a: Tensor,
    a_scale: Tensor,
    a_coarse: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_coarse: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return _result_like(a, b, dtype)


def _rows(x: Tensor) -> Tensor:
    """Join all dimensions but the last: ``[..., K]`` -> contiguous ``[M, K]``."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _values(x: Tensor) -> Tensor:
    """Join as `_rows` does, in a dtype that is quantized: autocast leaves activations as they are.

    torch_npu's operators take bfloat16 and float16, where `torch` would have cast to either.
    """
    rows = _rows(x)
    return rows if rows.dtype in DTYPES else rows.to(torch.bfloat16)


def _paired(scale: Tensor) -> Tensor:
    """Lay a row's e8m0 scales out in pairs: ``[rows, n]`` -> ``[rows, ceil(n / 2), 2]``."""
    even = F.pad(scale, (0, 1)) if scale.shape[-1] % 2 else scale
    return even.contiguous().view(even.shape[0], -1, 2)


def _unpaired(scale: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """Undo `_paired` for the rows of ``x [..., K]``: one scale for each 32 of ``rows``."""
    flat = scale.flatten(-2)[..., : rows.shape[-1] // BLOCK]
    return flat.contiguous().view(*x.shape[:-1], -1)


def _restore(out: Tensor, a: Tensor) -> Tensor:
    """Give the result its leading dimensions again: ``[M, N]`` -> ``[..., M, N]``."""
    return out.view(*a.shape[:-1], out.shape[-1])


def _result_like(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)
