"""Quantizing a large weight in one pass of C++ gives the bits of the formats' own arithmetic."""

from __future__ import annotations

import ctypes

import format_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses import FakeTensorMode

import omniq_compile as omniq
from omniq_compile.lowering.cpu import quantize as on_cpu
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.quantize_weight import holds_finite, quantize_weight

pytestmark = pytest.mark.skipif(on_cpu.load() is None, reason="no C++ compiler here")

FORMATS = tuple(on_cpu.METHODS)
LARGE = (1031, on_cpu.LARGE // 1031 + 1)

by_format = pytest.mark.parametrize("name", FORMATS)


def same(name: str, weight: torch.Tensor) -> bool:
    form = get_format(name)
    parts, exact = on_cpu.quantize(weight, form), form.quantize(weight)
    assert len(parts) == len(exact)
    return all(oracle.same_bits(a, b) for a, b in zip(parts, exact, strict=True))


@by_format
@settings(max_examples=60, deadline=None)
@given(x=oracle.tensors)
def test_bits(name: str, x: torch.Tensor) -> None:
    assert same(name, x)


@by_format
def test_every_bfloat16_beside_every_scale(name: str) -> None:
    """Each finite BF16 value in rows and in blocks with maxima from the smallest to the largest.

    So each code is met on both sides of each of its halves.
    """
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[torch.isfinite(values)].float()
    values = values[: values.numel() // 31 * 31].view(1, -1, 31)
    largest = torch.exp2(torch.arange(-149, 128, 3)).view(-1, 1, 1) * 1.25
    blocks = torch.where(values.abs() <= largest, values, 0.0)
    blocks = torch.cat([largest.expand(-1, blocks.shape[1], 1), blocks], 2)
    assert same(name, blocks.flatten(1))
    assert same(name, blocks)


@by_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_weight_takes_the_pass(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(LARGE).to(dtype)
    calls = []
    monkeypatch.setattr(on_cpu, "quantize", lambda w, f: calls.append(f.name) or ())
    assert quantize_weight(weight, name) == ()
    assert calls == [name]


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (torch.randn(1031, 1031), "int8"),
        (torch.randn(LARGE).half(), "int8"),
        (torch.randn(LARGE, dtype=torch.float64), "fp8"),
        (torch.randn(LARGE), "fp8_block_128x128"),
    ],
    ids=["small", "float16", "float64", "blocks"],
)
def test_others_are_quantized_by_torch(
    weight: torch.Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_cpu, "quantize", lambda *_: pytest.fail("the pass was taken"))
    exact = get_format(name).quantize(weight)
    parts = quantize_weight(weight, name)
    assert all(oracle.same_bits(a, b) for a, b in zip(parts, exact, strict=True))


def test_without_a_compiler_torch_quantizes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(LARGE).bfloat16()
    exact = quantize_weight(weight, "mxfp4")
    monkeypatch.setattr(on_cpu, "load", lambda: None)
    parts = quantize_weight(weight, "mxfp4")
    assert all(oracle.same_bits(a, b) for a, b in zip(parts, exact, strict=True))


def test_a_weight_without_values_is_not_read() -> None:
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(LARGE, dtype=torch.bfloat16))
        parts = quantize_weight(weight.detach(), "mxfp8")
        quantized = omniq.quantize(weight, "mxfp8")
    assert [part.shape for part in quantized.parts] == [part.shape for part in parts]
    assert parts[0].shape == (1031, 4096)


@by_format
def test_a_transposed_weight_and_other_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "PARALLEL", 0)
    weight = torch.randn(45, 70).t()
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 90):
            torch.set_num_threads(count)
            assert same(name, weight)
    finally:
        torch.set_num_threads(threads)


@by_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_scales(name: str, bad: float) -> None:
    weight = torch.randn(5, 70)
    form = get_format(name)
    assert holds_finite(on_cpu.quantize(weight, form))
    weight[3, 68] = bad
    assert not holds_finite(on_cpu.quantize(weight, form))


@by_format
def test_a_negation_that_is_still_to_be_applied(name: str) -> None:
    weight = torch._neg_view(torch.randn(45, 70))
    assert weight.is_neg()
    assert same(name, weight)


def test_an_error_of_the_library_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        @staticmethod
        def omniq_quantize(arguments: object, message: ctypes.Array, size: object) -> int:
            message.value = b"no memory"
            return 1

    monkeypatch.setattr(on_cpu, "load", lambda: Failing)
    with pytest.raises(RuntimeError, match=r"^no memory$"):
        on_cpu.quantize(torch.randn(3, 70), get_format("int8"))
