"""What the sample of a parameter's values shows of writes that move nothing else."""

from __future__ import annotations

import pytest
import torch

from omniq_compile.compiling import weight_changes


@pytest.mark.parametrize(
    "shape",
    [(3072, 3072), (12288, 3072), (3072, 12288), (5120, 1536), (400, 96), (64, 3072), (1, 9)],
)
@pytest.mark.parametrize("layout", ["plain", "transposed", "with gaps"])
def test_a_write_through_data_to_a_sixteenth_of_rows_or_columns_shows(
    shape: tuple[int, ...], layout: str
) -> None:
    weight = {
        "plain": lambda: torch.zeros(shape).to(torch.bfloat16),
        "transposed": lambda: torch.zeros(shape, dtype=torch.int8).mT,
        "with gaps": lambda: torch.zeros(shape[0], shape[1] + 64).to(torch.bfloat16)[:, : shape[1]],
    }[layout]()
    stamp = weight_changes.Stamp(weight)
    assert 100 < stamp.values.numel() < 600 or weight.numel() < 600
    for dim, size in enumerate(weight.shape):
        for first in range(0, size, -(-size // 16)):
            part = weight.data.narrow(dim, first, min(-(-size // 16), size - first))
            assert stamp.has_same_values()
            part.fill_(1)
            assert not stamp.has_same_values(), (dim, first)
            part.fill_(0)
