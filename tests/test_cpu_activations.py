"""`omniq::cpu_quantize_activation`: one pass of C++ gives the bits of the formats' arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import format_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from omniq_compile.lowering.cpu import quantize as on_cpu
from omniq_compile.lowering.cpu.quantize_activation import has_scales
from omniq_compile.lowering.cpu.quantize_activation import lower as quantize
from omniq_compile.lowering.decoded_bfloat16 import fake_quantize_scaled
from omniq_compile.lowering.formats.float_codes import E4M3_MAX

FORMATS = ("fp8_group_128", "fp8_group_96", *(f for f in on_cpu.METHODS if f != "int8"))

by_format = pytest.mark.parametrize("format", FORMATS)

pytestmark = pytest.mark.skipif(on_cpu.load() is None, reason="no C++ compiler here")


def without_denormals(values: Tensor) -> Tensor:
    """Zeros in their place: BF16 has too few bits for those, and may flush them."""
    return torch.where(values.abs() < torch.finfo(torch.float32).tiny, 0.0, values)


def same(x: Tensor, format: str) -> bool:
    outputs, exact = quantize(x, format), fake_quantize_scaled(x, format)
    assert [part.dtype for part in outputs] == [part.dtype for part in exact]
    return all(
        oracle.same_bits(without_denormals(a), without_denormals(b))
        for a, b in zip(outputs, exact, strict=True)
    )


@by_format
@settings(max_examples=60, deadline=None)
@given(x=oracle.tensors)
def test_bits(format: str, x: torch.Tensor) -> None:
    assert same(x, format)


@by_format
def test_float16_strides_and_many_rows(format: str) -> None:
    assert same(torch.randn(7, 70).half(), format)
    assert same(torch.randn(70, 3, 45).permute(1, 2, 0), format)
    assert same(torch.randn(70).bfloat16(), format)
    assert same(torch.randn(on_cpu.PARALLEL // 70 + 1, 70).bfloat16(), format)


@by_format
@pytest.mark.parametrize("shape", [(0, 70), (3, 0, 70)])
def test_no_rows(format: str, shape: tuple[int, ...]) -> None:
    outputs, exact = (
        quantize(torch.randn(shape), format),
        fake_quantize_scaled(torch.randn(shape), format),
    )
    assert [part.shape for part in outputs] == [part.shape for part in exact]


@by_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_what_shares_its_scale(format: str, bad: float) -> None:
    x = torch.randn(5, 1100)
    x[3, 600] = bad
    spoilt = [
        values.float() if scale is None else values.float() * scale
        for values, scale in (
            _spread(quantize(x, format)),
            _spread(fake_quantize_scaled(x, format)),
        )
    ]
    assert torch.equal(spoilt[0].isfinite(), spoilt[1].isfinite())
    assert not spoilt[0][3, 600].isfinite()
    finite = spoilt[0].isfinite()
    assert torch.equal(spoilt[0][finite], spoilt[1][finite])


def _spread(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    values = parts[0]
    if len(parts) == 1:
        return values, None
    scale = parts[1] if parts[1].dim() == values.dim() else parts[1].unsqueeze(-1)
    size = {3: 512, 9: 128, 12: 96, 1: values.shape[-1]}[scale.shape[-1]]
    return values, scale.repeat_interleave(size, -1)[..., : values.shape[-1]]


@by_format
def test_the_traced_shapes_are_those_of_the_result(format: str) -> None:
    x = torch.randn(3, 5, 1075)
    operators = torch.ops.omniq
    scaled = operators.cpu_quantize_activation_scaled.default
    operator = scaled if has_scales(format) else operators.cpu_quantize_activation.default
    torch.library.opcheck(operator, (x, format))


@by_format
def test_without_a_compiler_torch_quantizes(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 1075).bfloat16()
    parts = quantize(x, format)
    monkeypatch.setattr(on_cpu, "load", lambda: None)
    without = quantize(x, format)
    assert all(oracle.same_bits(a, b) for a, b in zip(parts, without, strict=True))


def test_the_values_are_those_of_the_format() -> None:
    """By hand: a row's largest is 448 steps, and halves round to even."""
    x = torch.tensor([[E4M3_MAX, 17.0, 19.0, -0.0, -1.0]])
    values, scale = quantize(x, "fp8")
    assert values.tolist() == [[448.0, 16.0, 20.0, -0.0, -1.0]]
    assert scale.tolist() == [1.0]
