"""fp8 on AMD GPUs through hipBLASLt.

gfx950 multiplies the OCP e4m3 that omniq stores. gfx942 multiplies e4m3 ``fnuz``, whose exponent
bias is 8 and not 7: the same byte is half the value, so that twice the scale makes the same number.
Two codes differ: 0x80, which is NaN there, becomes 0x00; and e4m3fn's NaN reads as 240, beside a
scale that is NaN or Inf itself. All others stay as they are, and so do the products.
"""

from __future__ import annotations

from functools import partial

import torch

from omniq_compile.lowering import gpu_quantize, scaled_mm
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.registry import Kernel

# hipBLASLt has no faster way to accumulate.
_gemm_rows = partial(scaled_mm.gemm_rows, fast_accum=False)


def to_fnuz(parts: Parts) -> Parts:
    """Reinterpret e4m3fn codes ``[..., K]`` with scales ``[...]`` as e4m3 fnuz, exactly."""
    codes, scale = parts
    byte = codes.view(torch.uint8)
    return torch.where(byte == 0x80, 0, byte).view(torch.float8_e4m3fnuz), scale * 2


def quantize_fnuz(x: torch.Tensor, format: str) -> Parts:
    """Return e4m3 fnuz codes ``[..., K]`` and scale ``[...]``, the values of omniq's fp8."""
    return to_fnuz(gpu_quantize.quantize(x, format))


SCALED_MM = Kernel(
    name="rocm_fp8_scaled_mm",
    method="fp8",
    device="rocm",
    archs=("gfx950",),
    native=True,
    about="torch._scaled_mm (hipBLASLt), a scale per row of both, scales and bias in its epilogue",
    quantize=gpu_quantize.quantize,
    gemm=_gemm_rows,
    refuse=scaled_mm.refuse_rows,
    takes_matrices=True,
)

SCALED_MM_FNUZ = Kernel(
    name="rocm_fp8_fnuz_scaled_mm",
    method="fp8",
    device="rocm",
    archs=("gfx942",),
    native=True,
    about="torch._scaled_mm (hipBLASLt), scales and bias in its epilogue; the weight's codes are "
    "copied as fnuz once, or in each call where they are stored",
    quantize=quantize_fnuz,
    gemm=_gemm_rows,
    refuse=scaled_mm.refuse_rows,
    arrange=to_fnuz,
    takes_matrices=True,
)
