"""fp8: e4m3 codes with float32 scales, per row, or per block of a weight and group of a token.

``scale = amax / 448`` in float32 arithmetic, ``code = x / scale`` rounded half to even and
saturated at +-448. There is no epsilon: an all-zero row has scale 0 and codes 0, and a row of tiny
numbers keeps its relative precision as long as its scale is a normal float32, for amax down to
5.3e-36. Below that the scale is a denormal and loses precision bit by bit, as it does where it is
flushed to zero and takes the row with it. A NaN or Inf makes its own scale NaN or Inf, and so only
what shares that scale.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.formats.float_codes import (
    E4M3_MAX,
    decode_e4m3,
    e4m3_pairs,
    encode_e4m3,
    join_bfloat16,
)
from omniq_compile.lowering.formats.format import Format, Parts


def scale_and_divide(
    real: torch.Tensor, dims: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``real / scale`` and the scale, amax / 448 over ``dims``, which it keeps as 1."""
    scale = real.abs().amax(dim=dims, keepdim=True) / E4M3_MAX
    return real / torch.where(scale == 0, 1.0, scale), scale


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row.

    Args:
        x: ``[..., K]``, any float dtype, K >= 1.

    Returns:
        codes float8_e4m3fn ``[..., K]`` and scale float32 ``[...]``.
    """
    quotient, scale = scale_and_divide(x.to(torch.float32), (-1,))
    return encode_e4m3(quotient), scale.squeeze(-1)


def allocate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantize` returns, without values."""
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


def dequantize(parts: Parts) -> torch.Tensor:
    """Return ``codes * scale`` in float32, ``[..., K]``."""
    codes, scale = parts
    return decode_e4m3(codes) * scale.unsqueeze(-1)


def codes_bfloat16(codes: torch.Tensor) -> torch.Tensor:
    """Decode codes alone, exactly: float8_e4m3fn ``[..., K]`` -> bfloat16 ``[..., K]``."""
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
    N, K = x.shape[-2:]
    across, down = _ceil(K, columns), _ceil(N, rows)
    if N % rows or K % columns:
        x = F.pad(x, (0, across * columns - K, 0, down * rows - N))
    block = x.to(torch.float32).unflatten(-1, (across, columns)).unflatten(-3, (down, rows))
    quotient, scale = scale_and_divide(block, (-3, -1))
    codes = encode_e4m3(quotient.flatten(-2).flatten(-3, -2)[..., :N, :K])
    return codes.contiguous(), scale.squeeze(-1).squeeze(-2)


def allocate_block(x: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantize_block` returns, without values."""
    *batch, N, K = x.shape
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    shape = (*batch, _ceil(N, rows), _ceil(K, columns))
    return codes, x.new_empty(shape, dtype=torch.float32)


def _repeat(scale: torch.Tensor, dim: int, times: int, size: int) -> torch.Tensor:
    """Repeat each entry along a negative ``dim``, cut to ``size``."""
    if times > 1:
        shape = [-1] * (scale.dim() + 1)
        shape[dim] = times
        scale = scale.unsqueeze(dim).expand(shape).flatten(dim - 1, dim)
    return scale.narrow(dim, 0, size)


def dequantize_block(parts: Parts, rows: int, columns: int) -> torch.Tensor:
    """Return ``codes * scale`` in float32, ``[..., N, K]``."""
    codes, scale = parts
    N, K = codes.shape[-2:]
    return decode_e4m3(codes) * _repeat(_repeat(scale, -1, columns, K), -2, rows, N)


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
        return [part.squeeze(-2) for part in parts]

    return Format(
        name=f"fp8_group_{columns}",
        parts=block.parts,
        nbytes=block.nbytes,
        quantize=lambda x: drop_row(block.quantize(x.unsqueeze(-2))),
        allocate=lambda x: drop_row(block.allocate(x.unsqueeze(-2))),
        dequantize=lambda parts: block.dequantize([part.unsqueeze(-2) for part in parts]).squeeze(
            -2
        ),
    )
