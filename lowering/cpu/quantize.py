"""Quantizes large weights on the CPU in one pass (quantize.cpp), to the bits of the formats."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from omniq_compile.lowering.cpu import library
from omniq_compile.lowering.formats.format import Format

# From here on the pass saves more than a first build of the library takes within a few weights.
LARGE = 1 << 22

# By format: the method in C++, and whether the block scale is UOS's.
_METHODS = {
    "int8": (0, False),
    "fp8": (1, False),
    "mxfp8": (2, False),
    "mxfp4": (3, False),
    "mxfp4_uos": (3, True),
    "mxfp4_dualscale": (4, False),
    "mxfp4_dualscale_uos": (4, True),
}


class _Arguments(ctypes.Structure):
    """``Arguments`` of quantize.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scale", "coarse")),
        *((name, ctypes.c_int64) for name in ("rows", "K", "bfloat16", "method", "uos", "threads")),
    )


def takes(weight: torch.Tensor, form: Format) -> bool:
    """Say whether `quantize` is for a weight: a large one on the CPU, of a format it knows."""
    return (
        # One that is traced, or any other subclass, may have no memory that C++ could read.
        type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.numel() >= LARGE
        and form.name in _METHODS
        and _library() is not None
    )


def quantize(weight: torch.Tensor, form: Format) -> tuple[torch.Tensor, ...]:
    """Return the parts that ``form.quantize(weight)`` returns, bit for bit, for finite values.

    Args:
        weight: float32 or bfloat16 ``[..., N, K]`` on the CPU.
        form: a format of `takes`.

    Raises:
        RuntimeError: the C++ reports an error, with its message.
    """
    parts = tuple(form.allocate(weight))
    built = _library()
    assert built is not None
    weight = weight.contiguous()
    K = weight.shape[-1]
    method, uos = _METHODS[form.name]
    arguments = _Arguments(
        *(library.pointer(tensor) for tensor in (weight, *parts, *(None,) * (3 - len(parts)))),
        *(weight.numel() // K, K, weight.dtype == torch.bfloat16, method, uos),
        torch.get_num_threads(),
    )
    library.call(built.omniq_quantize, arguments)
    return parts


@cache
def _library() -> ctypes.CDLL | None:
    return library.load("quantize")
