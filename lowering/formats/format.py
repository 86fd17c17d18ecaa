"""What a number format has to define: its parts, and the arithmetic between them and reals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Parts = Sequence[torch.Tensor]


def as_it_is(K: int) -> int:
    """Return K: most formats pad nothing."""
    return K


@dataclass(frozen=True)
class Format:
    """The arithmetic of one format, in plain torch operations that a compiler can fuse.

    Attributes:
        name: by which graphs and kernels name it.
        parts: the names of the tensors that stand for one matrix, codes first.
        nbytes: ``(N, K)`` -> bytes stored for a weight ``[N, K]``, every part counted.
        quantize: ``x [..., K]`` of any float dtype -> its parts.
        allocate: ``x [..., K]`` -> contiguous parts of the right shapes, without values.
        dequantize: parts -> float32 ``[..., K]``, with K padded to whole blocks where the format
            has blocks of a fixed size.
        row_block: how many rows of a matrix share a scale.
        padded: K -> K as the codes have it, rounded up to whole blocks where these are of a fixed
            size.
    """

    name: str
    parts: tuple[str, ...]
    nbytes: Callable[[int, int], int]
    quantize: Callable[[torch.Tensor], Parts]
    allocate: Callable[[torch.Tensor], Parts]
    dequantize: Callable[[Parts], torch.Tensor]
    row_block: int = 1
    padded: Callable[[int], int] = as_it_is
