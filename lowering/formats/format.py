"""What a method has to define: its parts, and the arithmetic between them and real numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Parts = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Format:
    """The arithmetic of one method, in plain torch operations that a compiler can fuse.

    Attributes:
        name: the method, as a user spells it.
        parts: the names of the tensors that stand for one matrix, codes first.
        nbytes: ``(N, K)`` -> bytes stored for a weight ``[N, K]``, every part counted.
        quantize: ``x [..., K]`` of any float dtype -> its parts.
        allocate: ``x [..., K]`` -> contiguous parts of the right shapes, without values.
        dequantize: parts -> float32 ``[..., K]``.
        gemm: the reference: ``(a_parts [..., M, K], b_parts [..., N, K], bias, dtype)`` ->
            ``[..., M, N]``. Slow and exact; every kernel is checked against it.
    """

    name: str
    parts: tuple[str, ...]
    nbytes: Callable[[int, int], int]
    quantize: Callable[[torch.Tensor], Parts]
    allocate: Callable[[torch.Tensor], Parts]
    dequantize: Callable[[Parts], torch.Tensor]
    gemm: Callable[[Parts, Parts, torch.Tensor | None, torch.dtype], torch.Tensor]
