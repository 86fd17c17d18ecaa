"""The operators that a lowered graph calls: one a kernel, each with a fake.

Lowering needs no Triton for them, and a graph prints each as one call. Where N and K are known,
AOTAutograd traces the launch itself, and Inductor launches it as it does its own kernels; where
they are not, Inductor calls the operator, which takes the host longer. They are registered without
`torch.library.custom_op`, whose wrappers took 145 of a call's 174 us on a slow core, and without
gradients, which omniq refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

# Private; `torch.library.triton_op` traces launches by it in the same way. Checked on torch 2.11
# to 2.15.
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.utils._pytree import tree_leaves

from omniq_compile.lowering.bias import check_bias
from omniq_compile.lowering.symbolic_sizes import traced_size
from omniq_compile.lowering.triton_kernels import launch

Operator = TypeVar("Operator", bound=Callable[..., Tensor])

_kept: ContextVar[bool] = ContextVar("_kept", default=False)


@contextmanager
def operators_kept() -> Iterator[None]:
    """Have AOTAutograd keep the operators, for compilers other than Inductor.

    Without Inductor, PyTorch runs a traced launch on the current device, whichever the operands are
    on, and lets Triton allocate nothing, which TMA's descriptors need.
    """
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


def _operator(function: Operator) -> Operator:
    """Register ``omniq::triton_NAME`` for every device."""
    name = f"omniq::triton_{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "default", function)
    torch.library.register_torch_dispatch(name, FunctionalTensorMode, partial(_traced, function))
    return function


def _traced(
    function: Callable[..., Tensor], mode: Any, operator: Any, types: Any, args: Any, kwargs: Any
) -> Any:
    """Trace the launch in place of the operator, or keep the operator: where N or K is symbolic,
    or in `operators_kept`.
    """
    given = dict(zip((a.name for a in operator._schema.arguments), args, strict=False)) | kwargs
    rows = [size for a in _tensors(given.pop("a")) for size in a.shape[:-1]]
    given.pop("a_scale", None)
    known = not _kept.get() and all(traced_size(size) is not None for size in rows)
    known &= all(isinstance(size, int) for b in _tensors(given) for size in b.shape)
    if not known or any(tensor.device.type != "cuda" for tensor in _tensors((args, kwargs))):
        return mode.__torch_dispatch__(operator, types, args, kwargs)
    with mode:
        return function(*args, **kwargs)


def _tensors(operands: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(operands) if isinstance(leaf, Tensor)]


@_operator
def row_scaled_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fnuz: bool,
) -> Tensor:
    """Multiply int8 or float8_e4m3fn codes with a scale per row of both.

    Args:
        a: codes ``[..., M, K]``, and a_scale float32 ``[..., M]``.
        b: codes ``[N, K]``, and b_scale float32 ``[N]``.
        bias: ``[N]``, any float dtype, or None.
        dtype: of the result, rounded to once.
        fnuz: multiply e4m3 as e4m3fnuz, which gfx942 has instead.

    Returns:
        ``[..., M, N]`` of ``dtype``.
    """
    operands = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale}
    out = _like(a, b, dtype)
    return _multiply(launch.row_scaled, out, **operands, bias=bias, fnuz=fnuz)


@torch.library.register_fake("omniq::triton_row_scaled_gemm")
def _(a, a_scale, b, b_scale, bias, dtype, fnuz):  # type: ignore[no-untyped-def]
    return _like(a, b, dtype)


@_operator
def block_scaled_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    a_columns: int,
    b_rows: int,
    b_columns: int,
    fnuz: bool,
) -> Tensor:
    """Multiply float8_e4m3fn codes with a scale per group of a and per block of b.

    Args:
        a: codes ``[..., M, K]``, and a_scale float32 ``[..., M, ceil(K / a_columns)]``.
        b: codes ``[N, K]``, and b_scale float32 ``[ceil(N / b_rows), ceil(K / b_columns)]``.
        a_columns, b_rows, b_columns: that share a scale.
        bias, dtype, fnuz: as in `row_scaled_gemm`.

    Returns:
        ``[..., M, N]`` of ``dtype``.
    """
    operands = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale}
    sizes = {"a_columns": a_columns, "b_rows": b_rows, "b_columns": b_columns}
    out = _like(a, b, dtype)
    return _multiply(launch.block_scaled, out, **operands, **sizes, bias=bias, fnuz=fnuz)


@torch.library.register_fake("omniq::triton_block_scaled_gemm")
def _(a, a_scale, b, b_scale, bias, dtype, a_columns, b_rows, b_columns, fnuz):  # type: ignore[no-untyped-def]
    return _like(a, b, dtype)


@_operator
def mx_gemm(a: list[Tensor], b: list[Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply MX operands with block-scaled tensor core instructions.

    Args:
        a: parts of mxfp8, mxfp4 or mxfp4_dualscale, ``[..., M, K]``.
        b: parts of one of them, ``[N, K]``; coarse scales if a has them.
        bias, dtype: as in `row_scaled_gemm`.

    Returns:
        ``[..., M, N]`` of ``dtype``.
    """
    out = _like(a[0], b[0], dtype)
    return _multiply(launch.mx, out, a=a, b=b, bias=bias)


@torch.library.register_fake("omniq::triton_mx_gemm")
def _(a, b, bias, dtype):  # type: ignore[no-untyped-def]
    return _like(a[0], b[0], dtype)


@_operator
def decoded_gemm(
    a: list[Tensor],
    b: Tensor,
    b_block: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    b_rows: int,
    columns: int,
) -> Tensor:
    """Multiply real activations by codes that are decoded in registers.

    Args:
        a: bfloat16 or float16 ``[..., M, K]`` and, or not, float32 scales
            ``[..., M, ceil(K / columns)]`` for it.
        b: float8_e4m3fn ``[N, K]``, e2m1 in uint8 ``[N, K / 2]``, or a's dtype ``[N, K]``.
        b_block: e8m0 in uint8 ``[N, K / 32]``, or None.
        b_scale: float32 ``[ceil(N / b_rows), ceil(K / columns)]``, or ``[N]`` where columns is 0,
            or None.
        b_rows, columns: that share an element of b_scale; columns 0 is all of K.
        bias, dtype: as in `row_scaled_gemm`.

    Returns:
        ``[..., M, N]`` of ``dtype``.
    """
    operands = {"a": a, "b": b, "b_block": b_block}
    scales = {"b_scale": b_scale, "b_rows": b_rows, "columns": columns}
    return _multiply(launch.decoded, _like(a[0], b, dtype), **operands, **scales, bias=bias)


@torch.library.register_fake("omniq::triton_decoded_gemm")
def _(a, b, b_block, b_scale, bias, dtype, b_rows, columns):  # type: ignore[no-untyped-def]
    return _like(a[0], b, dtype)


def _like(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)


def _multiply(make: Callable[..., launch.Launch], out: Tensor, **operands: Any) -> Tensor:
    """Launch what ``make`` says about contiguous operands; returns ``out``, filled.

    They keep their leading dimensions: Inductor would store what it computes once for each view.

    Raises:
        OmniqError: the bias is not ``[N]``, or the operands are not on a GPU.
    """
    check_bias(f"omniq::triton_{make.__name__}_gemm", operands["bias"], out.shape[-1])
    if out.numel():
        operands = {name: _contiguous(operand) for name, operand in operands.items()}
        device = launch.device_of(out.device)
        launch.run(make(**operands, out=out, device=device))
    return out


def _contiguous(operand: Any) -> Any:
    if isinstance(operand, Tensor):
        return operand.contiguous()
    return [part.contiguous() for part in operand] if isinstance(operand, list) else operand
