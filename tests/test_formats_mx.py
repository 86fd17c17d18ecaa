"""mxfp8 and mxfp4, bit for bit: against ml_dtypes, and torchao where it follows the standard."""

from __future__ import annotations

from functools import partial

import format_oracle as oracle
import numpy as np
import pytest
import torch
from format_oracle import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.formats import mx, mxfp4, mxfp8
from omniq_compile.lowering.formats.format import Format

FORMATS = [mxfp8.FORMAT, mxfp4.FORMAT, mxfp4.UOS_FORMAT]
FAKE = {
    "mxfp8": mxfp8.fake_quantize,
    "mxfp4": mxfp4.fake_quantize,
    "mxfp4_uos": partial(mxfp4.fake_quantize, scale_alg=mx.UOS),
}
by_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
inputs = given(
    rows=st.integers(1, 4),
    K=st.integers(1, 150),
    kind=st.sampled_from(oracle.KINDS),
    dtype=st.sampled_from(oracle.DTYPES),
    seed=st.integers(0, 2**31 - 1),
)


@by_format
@inputs
@settings(max_examples=150, deadline=None)
def test_equal_to_the_standard(
    format: Format, rows: int, K: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    x = oracle.make(kind, (rows, K), dtype, seed)
    element = oracle.E4M3 if format is mxfp8.FORMAT else oracle.E2M1
    codes, scale, values = oracle.mx(x.float().numpy(), element, format is mxfp4.UOS_FORMAT)
    if element is oracle.E2M1:
        codes = oracle.pack(codes)
    parts = format.quantize(x)
    assert np.array_equal(parts[0].view(torch.uint8).numpy(), codes)
    assert np.array_equal(parts[1].numpy(), scale)
    decoded = format.dequantize(parts)
    assert same_bits(decoded, torch.from_numpy(values))
    assert same_bits(FAKE[format.name](x), decoded)
    module = mxfp8 if format is mxfp8.FORMAT else mxfp4
    # Below its normal range bfloat16 keeps fewer bits than e4m3 has.
    normal = (decoded == 0) | (decoded.abs() >= 2.0**-126)
    assert same_bits(module.dequantize_bfloat16(parts).float()[normal], decoded[normal])
    for allocated, part in zip(format.allocate(x), parts, strict=True):
        assert (allocated.shape, allocated.dtype) == (part.shape, part.dtype)


@pytest.mark.parametrize("format", [mxfp8.FORMAT, mxfp4.FORMAT], ids=lambda f: f.name)
@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_torchao(format: Format, kind: str, dtype: torch.dtype) -> None:
    """Torchao halves the codes of blocks whose shared scale is 2**-127: left to ml_dtypes above."""
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    elements = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}
    x = oracle.make(kind, (64, 256), dtype, 7)
    expected_scale, expected = mx_tensor.to_mx(x, elements[format.name], mx.BLOCK)
    codes, scale = format.quantize(x)
    assert torch.equal(scale, expected_scale.view(torch.uint8))
    sure = scale != 0
    by_block = (-1, scale.shape[-1], codes.shape[-1] // scale.shape[-1])
    expected = expected.view(torch.uint8).reshape(by_block)
    assert torch.equal(codes.view(torch.uint8).reshape(by_block)[sure], expected[sure])


def test_the_shared_exponent_is_exact_around_powers_of_two() -> None:
    powers = torch.exp2(torch.arange(-149, 128, dtype=torch.float64)).float()
    below, above = powers.nextafter(torch.tensor(0.0)), powers.nextafter(torch.tensor(torch.inf))
    amax = torch.cat([powers, below, above])
    floor = torch.frexp(amax.double())[1] - 1
    for element in (mx.E4M3, mx.E2M1):
        expected = (floor - element.emax).clamp(-127, 127) + 127
        expected = expected.where(amax > 0, 0)
        assert torch.equal(mx.block_scale(amax, element), expected.int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale_alg", [mx.OCP, mx.UOS])
def test_amax_counts_as_what_it_is_in_the_dtype_of_the_values(
    dtype: torch.dtype, scale_alg: int
) -> None:
    exponents = torch.randint(-14, 15, (5000,), generator=torch.Generator().manual_seed(1))
    values = torch.ldexp(1 + torch.rand(5000), exponents)
    powers = torch.ldexp(torch.ones(5000), exponents)
    around = [torch.cat([powers, 1.8125 * powers]).nextafter(torch.tensor(to)) for to in (0.0, 1e9)]
    # Midway between a power and the value of the dtype below it, which is rounded to the power.
    around.append(powers * (1 - torch.finfo(dtype).eps / 4))
    # NaN of every sign and payload; nothing else midway between two values of the dtype.
    special = [0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x400000, 0]
    bits = torch.tensor(special, dtype=torch.int32).view(torch.float32)
    amax = torch.cat([values, powers, *around, bits])
    rounded = amax.to(dtype).float()
    expected = mx.block_scale(rounded, mx.E2M1, scale_alg)
    assert torch.equal(mx.block_scale(amax, mx.E2M1, scale_alg, dtype), expected)
    assert torch.equal(mx.block_scale(rounded, mx.E2M1, scale_alg, dtype), expected)
    assert expected[-7:].tolist() == [255] * 6 + [0]


def test_uos_doubles_the_scale_just_above_7_25() -> None:
    exponents = torch.arange(-120, 120)
    limit = 7.25 * torch.exp2(exponents.double()).float()
    above = limit.nextafter(torch.tensor(torch.inf))
    assert torch.equal(mx.block_scale(limit, mx.E2M1, mx.UOS), exponents.int() + 127)
    assert torch.equal(mx.block_scale(above, mx.E2M1, mx.UOS), exponents.int() + 128)


@by_format
def test_nothing_finite_decodes_to_infinity_or_nan(format: Format) -> None:
    largest = torch.finfo(torch.float32).max
    mantissa = torch.linspace(0.25, 1, 4096).unsqueeze(1) * largest
    x = torch.cat([mantissa, torch.full((4096, 31), -largest) * torch.rand(4096, 1)], 1)
    assert format.dequantize(format.quantize(x)).isfinite().all()
    codes, scale = format.quantize(torch.zeros(3, 64))
    assert codes.view(torch.uint8).eq(0).all()
    assert scale.eq(0).all()


@by_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_stays_in_its_block(format: Format, bad: float) -> None:
    x = torch.randn(3, 96)
    good = format.dequantize(format.quantize(x))
    x[1, 40] = bad
    codes, scale = format.quantize(x)
    decoded = format.dequantize((codes, scale))
    assert torch.equal((scale == 255).nonzero(), torch.tensor([[1, 1]]))
    assert decoded[1, 32:64].isnan().all()
    assert torch.equal(FAKE[format.name](x).isnan(), decoded.isnan())
    decoded[1, 32:64] = good[1, 32:64]
    assert same_bits(decoded, good)


@by_format
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_what_is_representable_stays(format: Format, kind: str) -> None:
    """Values stay; codes and scale too, unless a block decodes to less than its scale expects."""
    x = oracle.make(kind, (40, 128), torch.float32, 3)
    once = format.dequantize(format.quantize(x))
    again = format.quantize(once)
    assert torch.equal(format.dequantize(again), once)
    if format is mxfp8.FORMAT or format is mxfp4.FORMAT:
        # With the floor rule amax is at least 2**emax, and saturation keeps it in that binade.
        assert same_bits(again[1], format.quantize(x)[1])
        assert same_bits(again[0], format.quantize(x)[0])


@by_format
@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 5, 70), (2, 0, 33), (3, 1)])
def test_leading_dimensions(format: Format, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    parts = format.quantize(x)
    for allocated, part in zip(format.allocate(x), parts, strict=True):
        assert (allocated.shape, allocated.dtype) == (part.shape, part.dtype)
    rows = format.quantize(x.reshape(-1, shape[-1]))
    for part, row in zip(parts, rows, strict=True):
        assert same_bits(part.reshape(row.shape), row)
    assert format.dequantize(parts).shape == (*shape[:-1], mx.padded(shape[-1]))


@by_format
@pytest.mark.parametrize(("N", "K"), [(3, 512), (16, 1024), (5, 1), (7, 33), (1, 100)])
def test_nbytes_are_those_of_the_parts(format: Format, N: int, K: int) -> None:
    parts = format.quantize(torch.randn(N, K))
    assert format.nbytes(N, K) == sum(part.nbytes for part in parts)


def test_a_scale_alg_is_0_or_2() -> None:
    with pytest.raises(OptionError, match="0 \\(OCP\\), 2 \\(UOS\\)"):
        mxfp4.scale_format(1)
