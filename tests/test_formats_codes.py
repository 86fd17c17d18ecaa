"""The element types, against ml_dtypes: every code, every boundary of rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
import torch
from format_oracle import same_bits

from omniq_compile.lowering.formats import float_codes as fc

ELEMENTS = [
    pytest.param(fc.round_to_e4m3, fc.encode_e4m3, ml_dtypes.float8_e4m3fn, 448.0, id="e4m3"),
    pytest.param(fc.round_to_e2m1, fc.encode_e2m1, ml_dtypes.float4_e2m1fn, 6.0, id="e2m1"),
]
by_element = pytest.mark.parametrize(("rounded", "encode", "dtype", "largest"), ELEMENTS)
Function = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def flushed_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def boundaries(dtype: type) -> np.ndarray:
    """Every value of a type, every midpoint, and the float32 on both sides of each, signed."""
    values = np.arange(256, dtype=np.uint8)[: 256 if dtype is ml_dtypes.float8_e4m3fn else 16]
    real = values.view(dtype).astype(np.float32)
    real = np.unique(real[np.isfinite(real) & (real >= 0)])
    points = np.concatenate([real, (real[1:] + real[:-1]) / 2, [real[-1] * 1.04, real[-1] * 1.2]])
    points = points.astype(np.float32)
    around = [points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(1e9))]
    positive = np.concatenate([*around, np.float32([1e-45, 1e-38, 1e30, 3.4e38])])
    return np.concatenate([positive, -positive])


@by_element
def test_rounding_equals_a_cast_at_every_boundary(
    rounded: Function, encode: Function, dtype: type, largest: float
) -> None:
    random = np.random.default_rng(0).standard_normal(100_000) * np.logspace(-5, 4, 100_000)
    x = np.concatenate([boundaries(dtype), random.astype(np.float32)])
    codes = x.clip(-largest, largest).astype(dtype)
    tensor = torch.from_numpy(x)
    assert np.array_equal(encode(tensor).view(torch.uint8).numpy(), codes.view(np.uint8))
    assert same_bits(rounded(tensor), torch.from_numpy(codes.astype(np.float32)))
    with flushed_denormals():
        assert same_bits(rounded(tensor), torch.from_numpy(codes.astype(np.float32)))


@by_element
def test_infinity_saturates_and_nan_stays(
    rounded: Function, encode: Function, dtype: type, largest: float
) -> None:
    # NaN with one bit of its mantissa, the highest, and with all.
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([torch.inf, -torch.inf]), nan])
    out = rounded(x)
    assert out[:2].tolist() == [largest, -largest]
    assert out[2:].isnan().all()
    if encode is fc.encode_e4m3:
        assert fc.decode_e4m3(encode(x))[2:].isnan().all()
    else:
        assert encode(x)[2:].tolist() == [0, 0]


@pytest.mark.parametrize("flush", [False, True])
def test_every_code_decodes(flush: bool) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    e4m3 = every.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    e2m1 = every[:16].numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    e8m0 = every.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    with flushed_denormals() if flush else torch.no_grad():
        actual = fc.decode_e4m3(every.view(torch.float8_e4m3fn))
        small, scale = fc.decode_e2m1(every[:16]), fc.decode_e8m0(every)
    nan = torch.zeros(256, dtype=torch.bool)
    nan[[0x7F, 0xFF]] = True
    assert torch.equal(actual.isnan(), nan)
    assert same_bits(actual[~nan], torch.from_numpy(e4m3)[~nan])
    assert same_bits(small, torch.from_numpy(e2m1))
    assert scale[255].isnan()
    assert same_bits(scale[:255], torch.from_numpy(e8m0)[:255])


@pytest.mark.parametrize("flush", [False, True])
def test_every_code_times_every_scale_is_exact(flush: bool) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[(every & 127) != 127]
    values = fc.decode_e4m3(finite.view(torch.float8_e4m3fn)).unsqueeze(1)
    exact = values.double() * torch.exp2(torch.arange(255, dtype=torch.float64) - 127)
    with flushed_denormals() if flush else torch.no_grad():
        actual = fc.scale_by_e8m0(values, every[:255]).double()
    kept = exact.abs() >= (2.0**-126 if flush else 0)
    fits = exact.abs() <= torch.finfo(torch.float32).max
    assert torch.equal(actual[kept & fits], exact[kept & fits])
    assert actual[~fits].isinf().all()
    assert fc.scale_by_e8m0(values, every[255:]).isnan().all()


def test_two_codes_share_a_byte_low_nibble_first() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    packed = fc.pack_e2m1(codes[..., ::2], codes[..., 1::2])
    assert packed.tolist() == [[0x21, 0x0F]]
    every = torch.arange(256, dtype=torch.uint8)
    unpacked = fc.unpack_e2m1(every)
    assert torch.equal(fc.pack_e2m1(unpacked[::2], unpacked[1::2]), every)
    assert torch.equal(fc.unpack_e2m1(packed), codes)


@pytest.mark.parametrize("flush", [False, True])
def test_decoded_pairs_join_to_the_row(flush: bool) -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    joined = fc.join_bfloat16(*fc.e2m1_pairs(every))
    assert same_bits(joined, fc.decode_e2m1(fc.unpack_e2m1(every)).bfloat16())
    finite = every.where((every & 127) != 127, 0).view(torch.float8_e4m3fn)
    with flushed_denormals() if flush else torch.no_grad():
        joined = fc.join_bfloat16(*fc.e4m3_pairs(finite))
    assert same_bits(joined, fc.decode_e4m3(finite).bfloat16())
