"""A cast of a weight that names another tensor reads no more of it than its dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS, Holder, dequantized, error, run, sites
from torch import fx, nn

import omniq_compile as omniq
from omniq_compile.passes import dynamo
from omniq_compile.passes.expression import is_moved_weight
from omniq_compile.passes.sites import Kind

Cast = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

CASTS: dict[str, Cast] = {
    "to": lambda w, x: w.to(x),
    "to_copy": lambda w, x: w.to(x, non_blocking=True, copy=True),
    "type_as": lambda w, x: w.type_as(x),
    "type_as_keyword": lambda w, x: w.type_as(other=x),
    "type": lambda w, x: w.type(x.dtype),
    "type_keyword": lambda w, x: w.type(dtype=x.dtype),
    "named_type": lambda w, x: w.type(x.type()),
    "data": lambda w, x: w.data.to(x),
    "transposed": lambda w, x: w.t().to(x).t(),
}
KEPT = "the graph changes its weight in place"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASTS)
def test_a_weight_cast_like_an_activation_is_quantized(name: str, stored: torch.dtype) -> None:
    cast = CASTS[name]
    model = Holder(lambda x, w: F.linear(x, cast(w, x)), w=torch.randn(19, 38).to(stored))
    x = torch.randn(7, 38).bfloat16()
    result, (site,) = run(model, x)
    assert (site.kind, site.decision.method, site.weight_name) == (Kind.WEIGHT, "int8", "w")
    exact = dequantized(x) @ dequantized(model.w.bfloat16()).T
    assert error(result, exact) < 2.0**-8

    model.w.copy_(torch.randn(19, 38))
    exact = dequantized(x) @ dequantized(model.w.bfloat16()).T
    again = torch.compile(model, backend="omniq", options=OPTIONS)(x)
    assert error(again, exact) < 2.0**-8


@pytest.mark.parametrize("name", CASTS)
def test_under_autocast_a_cast_is_read_as_by_its_dtype(name: str) -> None:
    def layer(cast: Cast) -> Holder:
        return Holder(lambda x, w: F.linear(x, cast(w, x)), w=torch.randn(19, 38).double())

    x = torch.randn(7, 38)
    with torch.autocast("cpu", torch.bfloat16):
        (expected,) = sites(layer(lambda w, x: w.to(x.dtype)), x)
        torch._dynamo.reset()
        (site,) = sites(layer(CASTS[name]), x)
    assert site == expected


@pytest.mark.parametrize("name", ["to", "type_as", "type"])
def test_a_stored_weight_that_is_cast_to_what_it_is_stays_the_parameter(name: str) -> None:
    class Cast(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, CASTS[name](self.weight, x), self.bias)

    model = Cast(38, 19).requires_grad_(False)
    omniq.quantize_(model, OPTIONS)
    x = torch.randn(7, 38)
    result, (site,) = run(model, x)
    assert site.stored is not None
    weight = model.weight.dequantize()  # type: ignore[operator]
    assert error(result, dequantized(x) @ weight.double().T + model.bias.double()) < 5e-7


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("meta", False)])
@pytest.mark.parametrize("target", ["to", "type_as"])
def test_a_cast_to_another_device_reads_the_other_tensor(
    target: str, device: str, expected: bool
) -> None:
    graph = fx.Graph()
    w, x = graph.placeholder("w"), graph.placeholder("x")
    dynamo.set_value(w, nn.Parameter(torch.randn(19, 38)))
    dynamo.set_value(x, torch.randn(7, 38, device=device))
    cast = graph.call_method(target, (w, x))
    dynamo.set_value(cast, dynamo.value(w).to(dynamo.value(x)))
    assert is_moved_weight(cast) is expected


def test_a_type_of_another_device_is_not_a_cast_alone() -> None:
    graph = fx.Graph()
    w = graph.placeholder("w")
    dynamo.set_value(w, nn.Parameter(torch.randn(19, 38)))
    cast = graph.call_method("type", (w, "torch.cuda.FloatTensor"))
    dynamo.set_value(cast, torch.empty(19, 38, device="meta"))
    assert not is_moved_weight(cast)


# name: near misses, of which the weight depends on more than parameters and constants
OTHERS: dict[str, Cast] = {
    "cast_product": lambda w, x: (w * x[:1]).to(x),
    "cast_activation": lambda w, x: x[:19].to(w),
    "flipped_sum": lambda w, x: (w + x[:1]).flip(0),
    "padded_by_activation": lambda w, x: torch.vstack([w, x[:1]]),
    "dropout_in_training": lambda w, x: F.dropout(w, 0.5) * 0 + w,
    "repeats_of_a_tensor": lambda w, x: w.repeat_interleave(torch.tensor([2, 1]), 0, output_size=3),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_than_a_cast_or_a_move_is_kept(name: str) -> None:
    rows = 2 if name.startswith("repeats") else 19
    model = Holder(lambda x, w: F.linear(x, OTHERS[name](w, x)), w=torch.randn(rows, 38))
    x = torch.randn(23, 38)
    result, (site,) = run(model, x)
    assert (site.kind, site.decision.method) == (Kind.ACTIVATION, None)
    assert torch.equal(result, model(x))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_weight_with_as_many_rows_as_a_buffer_says_is_kept() -> None:
    class Repeated(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight.repeat_interleave(self.counts, 0))

    model, x = Repeated(38, 2, bias=False).requires_grad_(False), torch.randn(7, 38)
    model.register_buffer("counts", torch.tensor([2, 3]))
    call = torch.compile(model, backend="omniq", options=OPTIONS)
    (site,) = sites(model, x)
    assert site.decision.method is None
    for counts in ([2, 3], [4, 5]):
        model.counts.copy_(torch.tensor(counts))
        assert torch.equal(call(x), model(x))


def test_a_weight_with_rows_repeated_as_a_buffer_says_follows_both() -> None:
    class Repeated(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight.repeat_interleave(self.counts, 0, output_size=5))

    model, x = Repeated(38, 2, bias=False).requires_grad_(False), torch.randn(7, 38)
    model.register_buffer("counts", torch.tensor([2, 3]))
    call = torch.compile(model, backend="omniq", options=OPTIONS)
    (site,) = sites(model, x)
    assert (site.kind, site.decision.method) == ("weight x activation", "int8")
    for counts in ([2, 3], [4, 1]):
        model.counts.copy_(torch.tensor(counts))
        first, second = (dequantized(x) @ dequantized(model.weight).T).T
        exact = torch.stack([first] * counts[0] + [second] * counts[1], dim=1)
        assert error(call(x), exact) < 5e-7


# name: a write to what a weight is cast to, which may be the weight
WRITTEN: dict[str, Cast] = {
    "to": lambda w, x: w.to(x).mul_(1.5),
    "type_as": lambda w, x: w.type_as(x)[3:5].fill_(9.0),
    "type": lambda w, x: w.type(x.dtype).diagonal().add_(1.0),
    "movedim": lambda w, x: w.movedim(0, 1).add_(1.0),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_weight_that_is_written_through_its_cast_is_kept(name: str) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        WRITTEN[name](w, x)
        return F.linear(x, w.to(x))

    model, x = Holder(function, buffers=True, w=torch.randn(19, 38)), torch.randn(7, 38)
    eager = copy.deepcopy(model)
    result, (site,) = run(model, x)
    assert site.decision.reason == KEPT
    assert torch.equal(result, eager(x))
    assert torch.equal(model.w, eager.w)


def test_a_copy_that_is_written_is_kept() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        turned = w.flip(0)
        turned.mul_(2)
        return F.linear(x, turned)

    model, x = Holder(function, w=torch.randn(19, 38)), torch.randn(7, 38)
    result, (site,) = run(model, x)
    assert site.decision.reason == KEPT
    assert torch.equal(result, model(x))


def test_an_activation_cast_like_a_weight_may_be_written() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = x.to(w)
        h += 1
        return F.linear(h, w)

    model, x = Holder(function, w=torch.randn(19, 38)), torch.randn(7, 38)
    result, (site,) = run(model, x.clone())
    assert site.decision.method == "int8"
    assert error(result, dequantized(x + 1) @ dequantized(model.w).T) < 5e-7


def test_a_weight_that_is_no_parameter_is_called_an_input() -> None:
    class Unregistered(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.how(self.weight, x))  # type: ignore[operator]

    for how, what in (
        (lambda w, x: w, "an input, no parameter or buffer (option"),
        (lambda w, x: w.to(x).t().t(), "an input, no parameter or buffer (option"),
        (lambda w, x: w * 2, "computed in the graph (option"),
    ):
        torch._dynamo.reset()
        model = Unregistered(38, 19)
        weight = model.weight.detach()
        del model.weight
        model.weight, model.how = weight, how  # type: ignore[assignment]
        (site,) = sites(model, torch.randn(7, 38))
        assert site.decision.reason.startswith(f"its weight is {what}")
