"""Models that torch.export has exported have the sites that they had."""

from __future__ import annotations

import pytest
import torch
from conftest import error, run
from torch import nn
from torch.nn import functional as F

from omniq_compile.passes.sites import Kind


class Exported(nn.Module):
    """Products of the kinds that a transformer has, and a weight that is cut in three."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * 38, 38))
        self.out, self.up = nn.Linear(38, 19), nn.Linear(19, 29, bias=False)
        self.table = nn.Parameter(torch.randn(29, 23))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (F.linear(x, part) for part in self.qkv.chunk(3))
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return torch.einsum("bsk,kn->bsn", self.up(self.out(mixed)), self.table)


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_model_has_the_same_sites(decomposed: bool) -> None:
    torch.manual_seed(0)
    model, x = Exported().requires_grad_(False), torch.randn(2, 7, 38)
    exported = torch.export.export(model, (x,))
    if decomposed:
        exported = exported.run_decompositions()
    actual, found = run(exported.module(), x, matmul=True)
    expected, theirs = run(model, x, matmul=True)
    kinds = [site.kind for site in theirs]
    assert [site.kind for site in found] == kinds
    assert (kinds.count(Kind.WEIGHT), kinds.count(Kind.ACTIVATION)) == (6, 2)
    assert all(site.decision.method == "int8" for site in found)
    # What decomposes multiplies the same codes, and divides softmax's rows in another order.
    assert error(actual, expected) < 1e-5
