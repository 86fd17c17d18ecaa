"""Products with sizes that are no numbers while they are compiled."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import OPTIONS, Holder, dequantized, error
from torch import fx

from omniq_compile import QuantConfig
from omniq_compile.lowering.target import detect
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context
from omniq_compile.passes.sites import Site


def compile_and_see(function: Any, method: str, **arguments: Any) -> tuple[Any, list[Site]]:
    """Return the compiled function, and a list that gets the sites of each of its graphs."""
    config = QuantConfig.from_options(OPTIONS | {"method": method, "matmul": True})
    found: list[Site] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        context = Context(config, detect("cpu"))
        result = pipeline.run(gm, context)
        found.extend(context.sites)
        return result

    return torch.compile(function, backend=backend, **arguments), found


@pytest.mark.parametrize("method", ["int8", "fp8", "mxfp4"])
def test_a_k_that_the_call_computes_is_kept(method: str) -> None:
    def function(x: torch.Tensor, y: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        rows = torch.repeat_interleave(torch.arange(40), counts)
        return x[:, rows] @ y[rows]

    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        call, found = compile_and_see(function, method)
        x, y, counts = torch.randn(7, 40), torch.randn(40, 19), torch.randint(0, 3, (40,))
        torch.testing.assert_close(call(x, y, counts), function(x, y, counts))
        assert torch.equal(call(x, y, counts * 0), torch.zeros(7, 19))
    (site,) = found
    assert site.decision.method is None
    assert re.match(r"K = u\d+: known in each call alone", site.decision.reason)


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_a_k_of_nothing_when_traced_is_kept(method: str) -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x[:, 2:] @ y[2:]

    call, found = compile_and_see(function, method, dynamic=True)
    x, y = torch.randn(7, 2), torch.randn(2, 19)
    assert torch.equal(call(x, y), torch.zeros(7, 19))
    assert [site.decision.method for site in found] == [None]
    assert "empty" in found[0].decision.reason
    x, y = torch.randn(7, 40), torch.randn(40, 19)
    assert error(call(x, y), function(x, y)) < 0.06


def test_a_symbolic_k_is_quantized_by_rows() -> None:
    call, found = compile_and_see(torch.matmul, "int8", dynamic=True)
    for K in (38, 57):
        x, y = torch.randn(7, K), torch.randn(K, 19)
        assert error(call(x, y), dequantized(x) @ dequantized(y, -2)) < 5e-7
    assert [site.decision.method for site in found] == ["int8"]


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [{"capture_dynamic_output_shape_ops": True}, {"force_parameter_static_shapes": False}]
)
def test_a_weight_with_a_size_that_calls_decide_is_kept(config: dict[str, bool]) -> None:
    def function(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        chosen = w[v[:, 0] > 0] if "capture_dynamic_output_shape_ops" in config else w
        return torch.nn.functional.linear(x, chosen)

    model, x = Holder(function, w=torch.randn(19, 38), v=torch.randn(19, 5)), torch.randn(7, 38)
    with torch._dynamo.config.patch(config):
        whole = torch.compile(model, backend="omniq", options=OPTIONS, dynamic=True)
        assert torch.equal(whole(x), model(x))
        call, found = compile_and_see(model, "int8", dynamic=True)
        call(x)
    (site,) = found
    assert site.decision.reason == "its weight has a size that calls decide"
