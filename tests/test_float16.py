"""float16, whose largest number is 65504: PyTorch rounds a product once, and so does omniq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Holder, compiled, error, sites

M, K, N = 7, 256, 38

# name: a product whose sums alone are some 100,000, and whose result is not.
PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "alpha": lambda x, w, b: torch.addmm(b[0], x, w.t(), alpha=0.125),
    "no beta": lambda x, w, b: torch.baddbmm(b, x[None], w.t()[None], beta=0, alpha=0.125),
    "a bias for each row": lambda x, w, b: torch.addmm(b, x, w.t()),
    "a bias times beta": lambda x, w, b: torch.addmm(b[0], x, w.t(), beta=0.75),
    "a bias in the epilogue": lambda x, w, b: F.linear(x, w, b[0]),
}


@pytest.mark.parametrize("method", ["int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale"])
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("weight", [False, True])
def test_a_product_larger_than_its_result(name: str, method: str, weight: bool) -> None:
    function = PRODUCTS[name]
    # 4 and 6 times a power of two, which e2m1 has.
    x, w = ((torch.randint(2, 4, (rows, K)) * 8).half() for rows in (M, N))
    b = torch.full((M, N), -60000.0).half()
    exact = function(x.double(), w.double(), b.double())
    assert (x.double() @ w.double().t()).amin() > 65504
    assert exact.abs().amax() < 65504
    options: dict[str, Any] = {"method": method, "matmul": True}
    if method == "mxfp4_dualscale":
        options["num_bf16_fallback_layers"] = 0
    inputs = (x, b) if weight else (x, w, b)
    model = Holder(lambda x, b, w: function(x, w, b), w=w) if weight else Holder(function)
    result = compiled(model, **options)(*inputs)
    assert result.dtype is torch.float16
    assert error(result, exact) < 0.1
    (site,) = sites(model, *inputs, **options)
    assert site.decision.method == method
