"""fp8: e4m3 codes with float32 scales, per row, or per block of a weight and group of a token.

``scale = amax / 448`` in float32 arithmetic, ``code = x / scale`` rounded half to even and
saturated at +-448. There is no epsilon: an all-zero row has scale 0 and codes 0, and a row of tiny
numbers keeps its relative precision as long as its scale is a normal float32, for amax down to
5.3e-36. Below that the scale is a denormal and loses precision bit by bit, as it does where it is
flushed to zero and takes the row with it. A NaN or Inf makes its own scale NaN or Inf, and so only
what shares that scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.formats.blocks import repeat
from omniq_compile.lowering.formats.float_codes import (
    E4M3_MAX,
    decode_e4m3,
    e4m3_pairs,
    encode_e4m3,
    join_bfloat16,
    round_to_e4m3,
)
from omniq_compile.lowering.formats.format import Format, Parts


def amax_scale(real: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Return amax / 448 over ``dims``."""
    return real.abs().amax(dim=dims) / E4M3_MAX


def divide(real: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``real / scale``, and ``real`` where the scale is 0."""
    return real / torch.where(scale == 0, 1.0, scale)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row.

    Args:
        x: ``[..., K]``, any float dtype, K >= 1.

    Returns:
        codes float8_e4m3fn ``[..., K]`` and scale float32 ``[...]``.
    """
    real = x.to(torch.float32)
    scale = amax_scale(real, (-1,))
    return encode_e4m3(divide(real, scale.unsqueeze(-1))), scale


def allocate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantize` returns, without values."""
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


def dequantize(parts: Parts) -> torch.Tensor:
    """Return ``codes * scale`` in float32, ``[..., K]``."""
    codes, scale = parts
    return decode_e4m3(codes) * scale.unsqueeze(-1)


def fake_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of `quantize` as float32 values ``[..., K]``, and the scale ``[...]``."""
    real = x.to(torch.float32)
    scale = amax_scale(real, (-1,))
    return round_to_e4m3(divide(real, scale.unsqueeze(-1))), scale


def codes_bfloat16(codes: torch.Tensor) -> torch.Tensor:
    """Decode codes alone, exactly: float8_e4m3fn ``[..., K]`` -> bfloat16 ``[..., K]``.

    A NaN code, which stands beside a NaN or Inf scale, may come out as a number.
    """
    if codes.shape[-1] % 2:
        return decode_e4m3(codes).to(torch.bfloat16)
    return join_bfloat16(*e4m3_pairs(codes))


FORMAT = Format(
    name="fp8",
    parts=("codes", "scale"),
    nbytes=lambda N, K: N * K + 4 * N,
    quantize=quantize,
    allocate=allocate,
    dequantize=dequantize,
)


def _ceil(size: int, block: int) -> int:
    return (size + block - 1) // block


def repeat_scale(scale: torch.Tensor, rows: int, columns: int, N: int, K: int) -> torch.Tensor:
    """Give each element its block's scale: float32 ``[..., N, K]``."""
    by_column = repeat(scale, -1, columns, K)
    return by_column if rows == 1 else repeat(by_column, -2, rows, N)


def _divide_block(x: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    N, K = x.shape[-2:]
    across, down = _ceil(K, columns), _ceil(N, rows)
    real = x.to(torch.float32)
    whole = real
    if N % rows or K % columns:
        whole = F.pad(real, (0, across * columns - K, 0, down * rows - N))
    block = whole.unflatten(-1, (across, columns)).unflatten(-3, (down, rows))
    scale = amax_scale(block, (-3, -1))
    return divide(real, repeat_scale(scale, rows, columns, N, K)), scale


def quantize_block(x: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize blocks of ``rows`` by ``columns``; those at the edges may be smaller.

    Args:
        x: ``[..., N, K]``, any float dtype.
        rows: of a block.
        columns: of a block.

    Returns:
        codes float8_e4m3fn ``[..., N, K]``, and scale float32
        ``[..., ceil(N / rows), ceil(K / columns)]``.
    """
    return _quantize_block(x, rows, columns, encode_e4m3)


def fake_quantize_block(
    x: torch.Tensor, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of `quantize_block` as float32 values ``[..., N, K]``, and the scales."""
    return _quantize_block(x, rows, columns, round_to_e4m3)


def _quantize_block(
    x: torch.Tensor, rows: int, columns: int, encode: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    N, K = x.shape[-2:]
    # A larger block is one that is smaller at the edge, and would be padded to its whole size.
    quotient, scale = _divide_block(x, min(rows, N) or 1, min(columns, K) or 1)
    return encode(quotient), scale


def _quantize_group(
    x: torch.Tensor, columns: int, encode: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.shape[-1] % columns:
        quotient, scale = _divide_block(x.unsqueeze(-2), 1, columns)
        return encode(quotient).squeeze(-2), scale.squeeze(-2)
    # All in the shape of the amax: Inductor then generates one loop, and of two it would store the
    # activation in float32 between them on GPUs.
    group = x.unflatten(-1, (-1, columns)).to(torch.float32)
    scale = amax_scale(group, (-1,))
    return encode(divide(group, scale.unsqueeze(-1))).flatten(-2), scale


def quantize_group(x: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize groups of ``columns`` along K; the last one may be smaller.

    Args:
        x: ``[..., K]``, any float dtype.
        columns: that share a scale.

    Returns:
        codes float8_e4m3fn ``[..., K]``, and scale float32 ``[..., ceil(K / columns)]``.
    """
    return _quantize_group(x, columns, encode_e4m3)


def fake_quantize_group(x: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of `group_format` as float32 values, and the scales.

    Args:
        x: ``[..., K]``, any float dtype.
        columns: that share a scale.

    Returns:
        float32 ``[..., K]``, exact in e4m3, and scale float32 ``[..., ceil(K / columns)]``.
    """
    return _quantize_group(x, columns, round_to_e4m3)


def allocate_block(x: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantize_block` returns, without values."""
    *batch, N, K = x.shape
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    shape = (*batch, _ceil(N, rows), _ceil(K, columns))
    return codes, x.new_empty(shape, dtype=torch.float32)


def dequantize_block(parts: Parts, rows: int, columns: int) -> torch.Tensor:
    """Return ``codes * scale`` in float32, ``[..., N, K]``."""
    codes, scale = parts
    N, K = codes.shape[-2:]
    return decode_e4m3(codes) * repeat_scale(scale, rows, columns, N, K)


def block_format(rows: int, columns: int) -> Format:
    """Make the format of a weight ``[..., N, K]`` with a scale per block, ``fp8_block_RxC``.

    Raises:
        OptionError: rows or columns below 1.
    """
    if rows < 1 or columns < 1:
        raise OptionError(f"an fp8 block is at least 1 x 1, not {rows} x {columns}")
    return Format(
        name=f"fp8_block_{rows}x{columns}",
        parts=("codes", "scale"),
        nbytes=lambda N, K: N * K + 4 * _ceil(N, rows) * _ceil(K, columns),
        quantize=partial(quantize_block, rows=rows, columns=columns),
        allocate=partial(allocate_block, rows=rows, columns=columns),
        dequantize=partial(dequantize_block, rows=rows, columns=columns),
        row_block=rows,
    )


def group_format(columns: int) -> Format:
    """Make the format of an activation with a scale per 1 x ``columns``, ``fp8_group_C``.

    Its parts are codes ``[..., K]`` and scale ``[..., ceil(K / columns)]``.

    Raises:
        OptionError: columns below 1.
    """
    block = block_format(1, columns)

    def drop_row(parts: Parts) -> Parts:
        return tuple(part.squeeze(-2) for part in parts)

    return Format(
        name=f"fp8_group_{columns}",
        parts=block.parts,
        nbytes=block.nbytes,
        quantize=partial(quantize_group, columns=columns),
        allocate=lambda x: drop_row(block.allocate(x.unsqueeze(-2))),
        dequantize=lambda parts: block.dequantize([part.unsqueeze(-2) for part in parts]).squeeze(
            -2
        ),
    )
