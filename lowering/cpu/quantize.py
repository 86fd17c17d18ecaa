"""Quantizes on the CPU in one pass (quantize.cpp), to the bits of the formats: large weights."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch

from omniq_compile.lowering.cpu import library
from omniq_compile.lowering.formats import mxfp4_dualscale
from omniq_compile.lowering.formats.format import Format
from omniq_compile.lowering.registry import Problem

# From here on the pass saves more than a first build of the library takes within a few weights.
LARGE = 1 << 22

# From here on it saves more than the start of threads takes.
PARALLEL = 1 << 15

# By format: the method in C++, and whether the block scale is UOS's.
METHODS = {
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
        *((name, ctypes.c_void_p) for name in ("x", "codes", "bytes", "scale", "values")),
        *((name, ctypes.c_int64) for name in ("rows", "K", "columns", "bfloat16", "method", "uos")),
        ("threads", ctypes.c_int64),
    )


def takes(weight: torch.Tensor, form: Format) -> bool:
    """Say whether `quantize` is for a weight: a large one on the CPU, of a format it knows."""
    return (
        # One that is traced, or any other subclass, may have no memory that C++ could read.
        type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.numel() >= LARGE
        and form.name in METHODS
        and load() is not None
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
    codes, *scales = parts
    run(weight.contiguous(), form.name, scales, codes=codes)
    return parts


def run(
    x: torch.Tensor,
    format: str,
    scales: Sequence[torch.Tensor],
    *,
    codes: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    columns: int = 0,
) -> None:
    """Quantize ``x [..., K]``, which is contiguous, float32 or bfloat16, into one of two.

    Args:
        x: what is quantized.
        format: a key of `METHODS`.
        scales: into which the format's scales go; with ``values``, those in float32 alone.
        codes: into which the format's codes go.
        values: bfloat16 ``[..., K']``, into which goes what the codes stand for, without the
            float32 scales.
        columns: of K that share a float32 scale; 0 for all, or for the format's own number.

    Raises:
        RuntimeError: the C++ reports an error, with its message.
    """
    built = load()
    assert built is not None
    x = x.resolve_neg()  # in memory the values are what a lazy negation is still to be applied to
    K = x.shape[-1]
    method, uos = METHODS[format]
    if format.startswith("mxfp4_dualscale"):
        columns = mxfp4_dualscale.RUN
    by_dtype = {scale.dtype: scale for scale in scales}
    byte, scale = by_dtype.get(torch.uint8), by_dtype.get(torch.float32)
    arguments = _Arguments(
        *(library.pointer(tensor) for tensor in (x, codes, byte, scale, values)),
        *(x.numel() // K, K, columns or K, x.dtype == torch.bfloat16, method, uos),
        torch.get_num_threads() if x.numel() >= PARALLEL else 1,
    )
    library.call(built.omniq_quantize, arguments)


def start(problem: Problem) -> None:
    """Begin to build the library where `takes` will want it for a problem's weight."""
    if problem.b_is_weight and problem.K * problem.N >= LARGE:
        library.start("quantize")


@cache
def load() -> ctypes.CDLL | None:
    """Return the built library, or None where it cannot be built."""
    return library.load("quantize")
