"""Writing into views of a stored weight writes into the weight, as with any tensor."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import omniq_compile as omniq
from omniq_compile.lowering import quantized_tensor, written_views

METHODS = ("int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale")

# Each writes values that every format holds exactly, into all or a part of [64, 96].
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "a row": lambda w: w[3].zero_(),
    "rows": lambda w: w[8:40].zero_(),
    "a view of a view": lambda w: w[8:40][5:9].zero_(),
    "every element": lambda w: w[:].zero_(),
    "flat": lambda w: w.view(-1).fill_(3),
    "its own shape": lambda w: w.view_as(torch.empty(64, 96)).fill_(3),
    "expanded": lambda w: w.expand(64, 96).fill_(3),
    "transposed": lambda w: w.t().copy_(torch.ones(96, 64)),
    "one of several": lambda w: w.chunk(2)[1].zero_(),
    "narrowed": lambda w: w.narrow(0, 2, 5).zero_(),
    "of an alias": lambda w: w.data[3].zero_(),
    "as an output": lambda w: torch.mul(torch.zeros(96), 1.0, out=w[3]),
    "through a mask": lambda w: w[3:9].masked_fill_(torch.ones(6, 96, dtype=torch.bool), 0.0),
}


def stored(method: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A stored weight, and a plain one of the same values."""
    weight = omniq.quantize(torch.randn(64, 96), method)
    return tuple(  # type: ignore[return-value]
        torch.nn.Parameter(values, requires_grad=False)
        for values in (weight, weight.dequantize().clone())
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("method", METHODS)
def test_written_values_are_in_the_weight(method: str, write: str, mode: Any) -> None:
    weight, plain = stored(method)
    before = plain.clone()
    with mode():
        WRITES[write](weight)
        WRITES[write](plain)
    assert not torch.equal(plain, before)
    # What was not written is quantized once more, by scales that can only have become smaller.
    step = (omniq.quantize(plain.detach(), method).dequantize() - plain).abs().max()
    assert (weight.dequantize() - plain).abs().max() <= step
    written = plain != before
    assert torch.equal(weight.dequantize()[written], plain[written])
    assert not any(written_views._live.values())


@pytest.mark.parametrize("method", METHODS)
def test_reading_changes_nothing(method: str) -> None:
    weight, plain = stored(method)
    parts = [part.clone() for part in weight.parts]
    view = weight[3:9]
    assert torch.equal(view, plain[3:9])
    assert torch.equal(weight.t() @ torch.ones(64), plain.t() @ torch.ones(64))
    del view
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8))
               for a, b in zip(weight.parts, parts, strict=True))  # fmt: skip
    assert not any(written_views._live.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_view_that_is_still_there_and_its_weight_see_one_another(mode: Any) -> None:
    weight, _ = stored("mxfp8")
    with mode():
        see_one_another(weight)


def see_one_another(weight: Tensor) -> None:
    view = weight[3:9]
    later = view[1]
    view.fill_(2.0)
    assert torch.equal(weight.dequantize()[3:9], torch.full((6, 96), 2.0))
    weight.fill_(4.0)
    assert torch.equal(view, torch.full((6, 96), 4.0))
    del view
    later.zero_()
    other = weight[0]
    other.fill_(1.0)
    x = torch.nn.functional.linear(torch.ones(1, 96), weight)
    assert x[0, [0, 3, 4, 5]].tolist() == [96.0, 4 * 96.0, 0.0, 4 * 96.0]
    del later, other
    assert not any(written_views._live.values())


def test_a_compiled_linear_multiplies_what_was_written() -> None:
    layer = torch.nn.Linear(320, 288, bias=False)
    omniq.quantize_(layer, {"method": "int8"})
    compiled = torch.compile(layer, backend="omniq", options={"method": "int8"})
    x = torch.randn(5, 320)
    with torch.no_grad():
        before = compiled(x)
        layer.weight[7].zero_()
        after = compiled(x)
    assert torch.equal(after[:, 7], torch.zeros(5))
    assert before[:, 7].abs().min() > 0
    assert (after - layer(x)).norm() < 0.02 * layer(x).norm()


def test_a_view_outlives_other_values_of_its_weight() -> None:
    """As with any tensor: a view is of the memory that `data` had."""
    weight, _ = stored("int8")
    view = weight[0]
    weight.data = omniq.quantize(torch.ones(64, 96), "int8")
    view.zero_()
    del view
    assert torch.equal(weight.dequantize(), torch.ones(64, 96))


def test_a_weight_is_gone_with_its_last_view() -> None:
    weight, _ = stored("fp8")
    view = weight[0]
    del weight
    gc.collect()
    assert sum(map(len, written_views._live.values())) == 1
    del view
    assert not any(written_views._live.values())


def test_what_cannot_be_quantized_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[BaseException] = []
    monkeypatch.setattr("sys.unraisablehook", lambda error: said.append(error.exc_value))
    weight, plain = stored("int8")
    weight[3].fill_(torch.nan)
    (error,) = said
    assert isinstance(error, omniq.OmniqError)
    assert torch.equal(weight.dequantize(), plain)
    view = weight[3]
    view.fill_(torch.nan)
    with pytest.raises(omniq.OmniqError, match="NaN"):
        weight.dequantize()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_eager_linear_computes_its_weight_once(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To compare it for writes would wait for the device."""
    weight = omniq.quantize(torch.randn(40, 96), "int8")
    x = torch.randn(3, 96)
    computed = []
    rows = quantized_tensor.dequantize_rows
    monkeypatch.setattr(
        quantized_tensor, "dequantize_rows", lambda *args: computed.append(1) or rows(*args)
    )
    with mode():
        out = torch.nn.functional.linear(x, weight)
    assert len(computed) == 1
    assert torch.equal(out, torch.nn.functional.linear(x, weight.dequantize()))


def test_threads_may_take_and_drop_views_of_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = stored("int8")
    failed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def read() -> None:
        for _ in range(400):
            weight[0].sum()

    try:
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(read) for _ in range(3)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert failed == []
    assert written_views._of(weight) == ()
