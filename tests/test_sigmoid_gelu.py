"""On GPUs the tanh of a gelu is computed by its exponential, and gives the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import count, traced
from torch import fx, nn
from torch.nn import functional

from omniq_compile import QuantConfig
from omniq_compile.lowering.target import Target
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context

GPU, CPU = Target("cuda", "sm_90"), Target("cpu", "generic")
GELUS = (functional.gelu, torch.ops.aten.gelu.default)


def lowered(gm: fx.GraphModule, target: Target, skip: tuple[str, ...] = ()) -> fx.GraphModule:
    config = QuantConfig.from_options({"method": "int8", "min_features": 1})
    return pipeline.run(gm, Context(config, target), skip=skip)


def counts(model: Any, *args: Any, target: Target = GPU, skip: Any = ()) -> tuple[int, int]:
    """Return how many gelus are left of a call, and how many exponentials there are."""
    ((gm, _),) = traced(model, *args)
    gm = lowered(gm, target, skip)
    return sum(count(gm, gelu) for gelu in GELUS), count(gm, torch.exp2)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_each_tanh_gelu_is_replaced_for_gpus(dtype: torch.dtype) -> None:
    x = torch.randn(3, 7).to(dtype)
    model = nn.Sequential(nn.GELU(approximate="tanh"), nn.Dropout(), nn.GELU("tanh")).eval()
    assert counts(model, x) == (0, 2)
    assert counts(lambda x: torch.ops.aten.gelu.default(x, approximate="tanh"), x) == (0, 1)
    assert counts(model, x, target=Target("xpu", "xe")) == (0, 2)
    assert counts(model, x, target=Target("rocm", "gfx950")) == (0, 2)


@pytest.mark.parametrize(
    "near_miss", [functional.gelu, lambda x: functional.gelu(x, approximate="none"), torch.tanh]
)
def test_others_are_left(near_miss: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(3, 7)
    left = near_miss is not torch.tanh
    assert counts(lambda x: near_miss(x), x) == (left, 0)
    assert counts(tanh_gelu, x.double()) == (1, 0)
    assert counts(tanh_gelu, x, target=CPU) == (1, 0)
    assert counts(tanh_gelu, x, target=Target("npu", "ascend950")) == (1, 0)
    assert counts(tanh_gelu, x, skip=("sigmoid_gelu",)) == (1, 0)


def test_it_is_the_gelu_and_more_precise_below_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.randn(4000, generator=generator)])
    ((gm, _),) = traced(tanh_gelu, x)
    found, (exact, usual) = lowered(gm, GPU)(x)[0], (tanh_gelu(x.double()), tanh_gelu(x))
    assert found.dtype is torch.float32
    # float64 cancels too, some 16 digits down.
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=4e-15)
    # A hundredth of the steps that `1 + tanh` leaves where x is about -5.
    below = x < -4
    error = [(y.double() - exact)[below].abs().max() for y in (found, usual)]
    assert error[0] < 0.01 * error[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_has_16_bits_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.linspace(-4, 8, 4001).to(dtype)
    ((gm, _),) = traced(tanh_gelu, x)
    (found,) = lowered(gm, GPU)(x)
    assert found.dtype is dtype
    step = 1.01 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), tanh_gelu(x.double()), rtol=step / 2, atol=1e-7)


def test_it_keeps_what_a_gelu_makes_of_infinities_and_nan() -> None:
    x = torch.tensor([torch.inf, torch.nan, -torch.inf, 0.0, -0.0, 3e38, -3e38])
    ((gm, _),) = traced(tanh_gelu, x)
    (found,) = lowered(gm, GPU)(x)
    assert torch.equal(found[[0, 3, 4, 5]], x[[0, 3, 4, 5]])
    assert found[1].isnan()
    # -inf times 0, as PyTorch has it.
    assert found[2].isnan()
    assert tanh_gelu(x)[2].isnan()
    assert found[6] == 0
