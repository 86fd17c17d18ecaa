"""``omniq::padded_int_mm``: few rows are padded for `torch._int_mm`, others are not copied."""

from __future__ import annotations

import pytest
import torch

from omniq_compile.lowering.padded_int_mm import padded_int_mm


def test_it_keeps_what_torch_library_asks_of_operators() -> None:
    codes = torch.randint(-127, 128, (2, 3, 72), dtype=torch.int8)
    torch.library.opcheck(padded_int_mm, (codes, codes[0, :, :].repeat(8, 1)))


@pytest.mark.parametrize(("rows", "copied"), [(16, True), (17, False), (64, False)])
def test_codes_are_copied_only_to_be_padded(
    monkeypatch: pytest.MonkeyPatch, rows: int, copied: bool
) -> None:
    given = []

    def int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        given.append(a.data_ptr())
        return a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.int32)

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    codes = torch.randint(-127, 128, (rows, 40), dtype=torch.int8)
    padded_int_mm(codes, codes[:8])
    assert given == [given[0]]
    assert (given[0] != codes.data_ptr()) == copied
