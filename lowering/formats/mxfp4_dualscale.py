"""mxfp4_dualscale: a coarse float32 scale per 512 along K, then mxfp4 on ``x / coarse``.

``coarse = amax / 6`` over a run of 512, in float32: the run's largest element becomes 6, e2m1's
largest value, whereas mxfp4 alone rounds it like any other, by up to a quarter. An all-zero run has
coarse 0. A NaN or Inf makes its run's coarse scale NaN or Inf, and only that run decodes to values
that are not finite. Where amax / 6 is a float32 denormal (amax below 7e-38) the coarse scale keeps
only the precision of that denormal.
"""

from __future__ import annotations

from functools import partial

import torch

from omniq_compile.lowering.formats import mx, mxfp4
from omniq_compile.lowering.formats.blocks import pad_last, repeat
from omniq_compile.lowering.formats.float_codes import E2M1_MAX
from omniq_compile.lowering.formats.format import Format, Parts

RUN = 512
BLOCKS_A_RUN = RUN // mx.BLOCK

_MIN_NORMAL = torch.finfo(torch.float32).tiny


def runs(K: int) -> int:
    """Return how many coarse scales a row of K has."""
    return (K + RUN - 1) // RUN


def divide_coarse(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take the coarse scale out.

    Args:
        x: ``[..., K]``, any float dtype.

    Returns:
        blocks of ``x / coarse``, float32 ``[..., ceil(K / 32), 32]``, their amax,
        ``[..., ceil(K / 32), 1]``, and coarse, float32 ``[..., ceil(K / 512)]``.
    """
    block = mx.blocks(x)
    amax = block.abs().amax(dim=-1)
    split = pad_last(amax, BLOCKS_A_RUN).unflatten(-1, (runs(x.shape[-1]), BLOCKS_A_RUN))
    coarse = split.amax(dim=-1) / E2M1_MAX
    divisor = repeat(torch.where(coarse == 0, 1.0, coarse), -1, BLOCKS_A_RUN, block.shape[-2])
    # A correctly rounded division keeps the order, so that the largest stays the largest.
    return block / divisor.unsqueeze(-1), _divide_amax(amax, divisor).unsqueeze(-1), coarse


def _divide_amax(amax: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Return ``amax / divisor``, exact on every device where a block's scale jumps.

    It jumps at powers of two and at 7.25 times one. An amax of BF16 that is two thirds of its run's
    is exactly at 4, and on a GPU a compiled division has an error of up to 2 units in the last
    place: just below 4, a block would get half its scale, and its largest element saturate at 3.
    """
    ratio = amax / divisor
    short = ((ratio.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
    # The product of 8 significant bits and 16 is exact, and so is the ratio if it is amax. Where
    # amax of BF16 or FP16 is at a jump, coarse has at most 10.
    few = (divisor.view(torch.int32) & 0xFF) == 0
    is_short = few & (short * divisor == amax) & (amax >= _MIN_NORMAL)
    return torch.where(is_short, short, ratio)


def quantize(
    x: torch.Tensor, scale_alg: int = mx.OCP
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize runs of 512 and blocks of 32.

    Args:
        x: ``[..., K]``, any float dtype.
        scale_alg: `mx.OCP` or `mx.UOS`.

    Returns:
        codes uint8 ``[..., K' / 2]``, e8m0 scale uint8 ``[..., K' / 32]`` and coarse float32
        ``[..., ceil(K / 512)]``, where K' is K padded to whole blocks.
    """
    block, amax, coarse = divide_coarse(x)
    return *mxfp4.quantize_blocks(block, amax, scale_alg), coarse


def allocate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `quantize` returns, without values."""
    *rows, K = x.shape
    return *mxfp4.allocate(x), x.new_empty((*rows, runs(K)), dtype=torch.float32)


def apply_coarse(values: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """Multiply MX values ``[..., K']`` by their runs' coarse scales ``[..., ceil(K / 512)]``."""
    return values * repeat(coarse, -1, RUN, values.shape[-1])


def dequantize(parts: Parts) -> torch.Tensor:
    """Return float32 ``[..., K']``."""
    codes, scale, coarse = parts
    return apply_coarse(mxfp4.dequantize((codes, scale)), coarse)


def fake_quantize(x: torch.Tensor, scale_alg: int = mx.OCP) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the MX values of ``x / coarse`` and the coarse scale, without making codes.

    ``apply_coarse`` of the two is ``dequantize(quantize(x))``, bit for bit.

    Args:
        x: ``[..., K]``, any float dtype.
        scale_alg: `mx.OCP` or `mx.UOS`.

    Returns:
        float32 ``[..., K']``, which bfloat16 holds exactly, and coarse float32
        ``[..., ceil(K / 512)]``.
    """
    block, amax, coarse = divide_coarse(x)
    return mx.fake_quantize_blocks(block, amax, mx.E2M1, scale_alg).flatten(-2), coarse


def scale_format(scale_alg: int) -> Format:
    """Make ``mxfp4_dualscale`` (``scale_alg`` 0) or ``mxfp4_dualscale_uos`` (2).

    Raises:
        OptionError: neither 0 nor 2.
    """
    return Format(
        name="mxfp4_dualscale" + mxfp4.name_suffix(scale_alg),
        parts=("codes", "scale", "coarse"),
        nbytes=lambda N, K: mxfp4.nbytes(N, K) + 4 * N * runs(K),
        quantize=partial(quantize, scale_alg=scale_alg),
        allocate=allocate,
        dequantize=dequantize,
        padded=mx.padded,
    )


FORMAT = scale_format(mx.OCP)
UOS_FORMAT = scale_format(mx.UOS)
