"""Stored weights in graphs that PyTorch's own compiler makes, and remembers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omniq_compile import QuantizedTensor
from omniq_compile.lowering import quantized_tensor


def stored(format: str, N: int, K: int) -> QuantizedTensor:
    weight = torch.randn(N, K, dtype=torch.bfloat16)
    return QuantizedTensor.from_weight(weight, format, method=format)


def test_inductor_decodes_the_last_incomplete_block_too() -> None:
    """What it generated computed whole blocks alone, and left the others as memory was."""
    weights = stored("mxfp8", 5, 40), stored("mxfp4", 5, 203), stored("mxfp4_dualscale", 5, 1000)

    @torch.compile(dynamic=False)
    def values(*weights: Tensor) -> list[Tensor]:
        return [weight * 1 for weight in weights]

    for weight, found in zip(weights, values(*weights), strict=True):
        assert torch.equal(found, weight.dequantize())


def test_a_graph_of_other_code_is_not_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = stored("mxfp4", 5, 40)
    before = weight._stable_hash_for_caching()
    assert stored("mxfp4", 5, 40)._stable_hash_for_caching() == before
    monkeypatch.setattr(quantized_tensor, "_traced_code", lambda: "of another version")
    assert weight._stable_hash_for_caching() != before
