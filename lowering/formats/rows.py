"""Quantizes and dequantizes large matrices some rows at a time, to the same numbers."""

from __future__ import annotations

import torch

from omniq_compile.lowering.formats.format import Format, Parts

# Elements worked on at a time. On a CPU the float32 temporaries stay in cache, 2 MiB each. On other
# devices a step is about ten launches: at 32 MiB a model of 20e9 weights takes 3,000, not 40,000.
CHUNK_ELEMENTS = 1 << 19
ACCELERATOR_CHUNK_ELEMENTS = 1 << 23


def _step(form: Format, K: int, device: torch.device) -> int:
    elements = CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    return max(1, elements // max(1, K) // form.row_block) * form.row_block


def quantize_rows(weight: torch.Tensor, form: Format) -> tuple[torch.Tensor, ...]:
    """Quantize ``weight [..., N, K]``; returns contiguous parts."""
    parts = tuple(form.allocate(weight))
    (N, K), batch = weight.shape[-2:], weight.shape[:-2]
    flat = [part.view(-1, *part.shape[len(batch) :]) for part in parts]
    step = _step(form, K, weight.device)
    for index, matrix in enumerate(weight.reshape(-1, N, K)):
        for start in range(0, N, step):
            chunk = form.quantize(matrix[start : start + step])
            for output, part in zip(flat, chunk, strict=True):
                first = start if output.shape[1] == N else start // form.row_block
                output[index, first : first + part.shape[0]] = part
    return parts


def dequantize_rows(
    parts: Parts, form: Format, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """Return the values ``shape = [..., N, K]`` that the parts stand for, rounded to ``dtype``."""
    (N, K), batch = shape[-2:], shape[:-2]
    result = torch.empty(shape, dtype=dtype, device=parts[0].device)
    flat = [part.reshape(-1, *part.shape[len(batch) :]) for part in parts]
    step = _step(form, K, result.device)
    for index, matrix in enumerate(result.view(-1, N, K)):
        for start in range(0, N, step):
            stop = min(start + step, N)
            chunk = [
                part[index, start:stop]
                if part.shape[1] == N
                else part[index, start // form.row_block : -(-stop // form.row_block)]
                for part in flat
            ]
            matrix[start:stop] = form.dequantize(chunk)[..., :K]
    return result
