"""``omniq::cpu_quantize_activation``: what CPU kernels multiply with a weight that is decoded.

One pass of C++ (quantize.cpp), as an operator that takes any shape. Inductor would generate this
arithmetic anew for each producer of an activation, and a first call took up to twice as long. There
are two operators, by the number of results: where one returns a list of one tensor, what Inductor
generates with ``cpp_wrapper`` ends the process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniq_compile.lowering import recycled
from omniq_compile.lowering.cpu import quantize
from omniq_compile.lowering.decoded_bfloat16 import fake_quantize_scaled
from omniq_compile.lowering.formats import block_size, get_format, unquantized


def quantize_activation(x: Tensor, format: str) -> tuple[Tensor, ...]:
    """Return what `decoded_bfloat16.fake_quantize_scaled` does, to the bit but for denormals.

    Whatever shares a scale with a NaN or Inf is not finite once the scale is applied: which of the
    two says so may differ.

    Args:
        x: ``[..., K]``, any float dtype.
        format: any float format.

    Returns:
        bfloat16 ``[..., K']``, and beside it the float32 scales that the format has: ``[...]``, or
        ``[..., n]`` for groups of K.

    Raises:
        RuntimeError: the C++ reports an error, with its message.
    """
    if quantize.load() is None:
        return tuple(part.contiguous() for part in fake_quantize_scaled(x, format))
    values = recycled.empty(_shape(x, format), torch.bfloat16)
    scales = _scales(x, format)
    if x.dtype not in (torch.float32, torch.bfloat16):
        x = x.to(torch.float32)
    if values.numel():
        group = block_size(format)
        name, columns = ("fp8", group[1]) if group else (format, 0)
        quantize.run(x.contiguous(), name, scales, values=values, columns=columns)
    return values, *scales


@torch.library.custom_op("omniq::cpu_quantize_activation", mutates_args=(), device_types="cpu")
def _values_alone(x: Tensor, format: str) -> Tensor:
    """Call `quantize_activation` for a format whose scales are in its values."""
    (values,) = quantize_activation(x, format)
    return values


@torch.library.custom_op(
    "omniq::cpu_quantize_activation_scaled", mutates_args=(), device_types="cpu"
)
def _values_and_scales(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Call `quantize_activation` for a format with scales in float32."""
    values, scales = quantize_activation(x, format)
    return values, scales


@_values_alone.register_fake
def _(x: Tensor, format: str) -> Tensor:
    return x.new_empty(_shape(x, format), dtype=torch.bfloat16)


@_values_and_scales.register_fake
def _(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    (scales,) = _scales(x, format)
    return x.new_empty(_shape(x, format), dtype=torch.bfloat16), scales


def _shape(x: Tensor, format: str) -> tuple[int, ...]:
    return (*x.shape[:-1], get_format(format).padded(x.shape[-1]))


def _scales(x: Tensor, format: str) -> list[Tensor]:
    _, *scales = get_format(format).allocate(x)
    return [scale for scale in scales if scale.dtype == torch.float32]


def lower(x: Tensor, format: str) -> tuple[Tensor, ...]:
    """Call the operator of a format; see `Kernel.quantize`."""
    if format == unquantized.FORMAT.name:
        return tuple(fake_quantize_scaled(x, format))
    if not has_scales(format):
        return (torch.ops.omniq.cpu_quantize_activation(x, format),)
    # By number: what a traced call returns cannot be iterated over.
    parts = torch.ops.omniq.cpu_quantize_activation_scaled(x, format)
    return parts[0], parts[1]


def has_scales(format: str) -> bool:
    """Say whether a format has scales beside its values, in float32."""
    return format.startswith(("fp8", "mxfp4_dualscale"))
