"""fp8 per row, per block and per group: against numpy float32 and ml_dtypes."""

from __future__ import annotations

import format_oracle as oracle
import ml_dtypes
import numpy as np
import pytest
import torch
from format_oracle import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.formats import fp8

FORMATS = [fp8.FORMAT, fp8.group_format(128), fp8.block_format(128, 128), fp8.block_format(3, 7)]
by_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def numpy_quantize(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """One scale for all of ``x``: amax / 448, and the quotient cast by ml_dtypes."""
    scale = np.float32(np.abs(x).max() / np.float32(448))
    quotient = x / (scale if scale else np.float32(1))
    return quotient.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn), scale


@given(
    N=st.integers(1, 9),
    K=st.integers(1, 40),
    rows=st.integers(1, 10),
    columns=st.integers(1, 20),
    kind=st.sampled_from(oracle.KINDS),
    dtype=st.sampled_from(oracle.DTYPES),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=200, deadline=None)
def test_equal_to_the_definition(
    N: int, K: int, rows: int, columns: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    x = oracle.make(kind, (N, K), dtype, seed)
    for format, height, width in (
        (fp8.FORMAT, 1, K),
        (fp8.group_format(columns), 1, columns),
        (fp8.block_format(rows, columns), rows, columns),
    ):
        codes, scale = format.quantize(x)
        by_block = scale.reshape(-(-N // height), -(-K // width))
        decoded = format.dequantize((codes, scale))
        for i in range(by_block.shape[0]):
            for j in range(by_block.shape[1]):
                at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                expected, expected_scale = numpy_quantize(x[at].float().numpy())
                assert np.array_equal(by_block[i, j].numpy(), expected_scale)
                assert np.array_equal(codes.view(torch.uint8)[at].numpy(), expected.view(np.uint8))
                product = torch.from_numpy(expected.astype(np.float32) * expected_scale)
                assert same_bits(decoded[at].contiguous(), product)
        assert format.nbytes(N, K) == codes.nbytes + scale.nbytes


@by_format
@pytest.mark.parametrize("shape", [(2, 3, 130, 70), (0, 129), (5, 1), (2, 0, 256), (300, 257)])
def test_allocate_has_the_shapes_of_quantize(format: fp8.Format, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    parts = format.quantize(x)
    for allocated, part in zip(format.allocate(x), parts, strict=True):
        assert (allocated.shape, allocated.dtype) == (part.shape, part.dtype)
        assert part.is_contiguous()
        assert allocated.is_contiguous()
    assert format.dequantize(parts).shape == shape
    if len(shape) == 4:
        for i in range(2):
            one = format.quantize(x[i, 0])
            assert same_bits(parts[0][i, 0], one[0])
            assert same_bits(parts[1][i, 0], one[1])


@by_format
def test_tiny_rows_keep_their_relative_precision(format: fp8.Format) -> None:
    x = torch.randn(256, 256)
    error = format.dequantize(format.quantize(x)) - x
    small = x * 2.0**-100
    scaled = format.dequantize(format.quantize(small)) - small
    assert torch.equal(scaled, error * 2.0**-100)
    assert error.norm() / x.norm() < 0.03
    codes, scale = format.quantize(torch.zeros(3, 5))
    assert oracle.bits(codes).eq(0).all()
    assert scale.eq(0).all()


@by_format
def test_nothing_finite_decodes_to_infinity(format: fp8.Format) -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max]).view(torch.int32)
    x = (largest - torch.arange(4096, dtype=torch.int32)).view(torch.float32)
    assert format.dequantize(format.quantize(x.unsqueeze(1))).isfinite().all()


@by_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_stays_with_its_scale(format: fp8.Format, bad: float) -> None:
    x = torch.randn(257, 300)
    good_codes, good_scale = format.quantize(x)
    x[4, 10] = bad
    codes, scale = format.quantize(x)
    decoded = format.dequantize((codes, scale))
    assert scale.isfinite().logical_not().sum() == 1
    spoiled = ~decoded.isfinite()
    assert spoiled[4, 10]
    assert spoiled.sum() == {"fp8": 300, "fp8_block_128x128": 128**2, "fp8_group_128": 128}.get(
        format.name, 21
    )
    assert torch.equal(codes.view(torch.uint8)[~spoiled], good_codes.view(torch.uint8)[~spoiled])
    assert torch.equal(scale[scale.isfinite()], good_scale[scale.isfinite()])


def test_the_values_made_without_codes_are_the_codes() -> None:
    x = oracle.make("heavy", (9, 333), torch.bfloat16, 2)
    codes, scale = fp8.quantize(x)
    values, same_scale = fp8.fake_quantize(x)
    assert same_bits(values, fp8.decode_e4m3(codes))
    assert same_bits(scale, same_scale)
    codes, scale = fp8.group_format(128).quantize(x)
    values, same_scale = fp8.fake_quantize_group(x, 128)
    assert same_bits(values.contiguous(), fp8.decode_e4m3(codes))
    assert same_bits(scale, same_scale)
    codes, scale = fp8.block_format(4, 100).quantize(x)
    values, same_scale = fp8.fake_quantize_block(x, 4, 100)
    assert same_bits(values.contiguous(), fp8.decode_e4m3(codes))
    assert same_bits(scale, same_scale)
    for K in (332, 333):
        cut = codes[:, :K].contiguous()
        assert same_bits(fp8.codes_bfloat16(cut), fp8.decode_e4m3(cut).bfloat16())


@pytest.mark.parametrize(("rows", "columns"), [(10**9, 10**9), (1, 10**9), (10**9, 7)])
def test_a_block_larger_than_the_weight_is_the_weight(rows: int, columns: int) -> None:
    """In the memory of the weight: a tenth of 10**9 numbers would take more than there is."""
    x = torch.randn(6, 25)
    large, cut = fp8.block_format(rows, columns), fp8.block_format(min(rows, 6), min(columns, 25))
    parts = large.quantize(x)
    assert all(map(same_bits, parts, cut.quantize(x)))
    assert same_bits(large.dequantize(parts), cut.dequantize(parts))
    assert [part.shape for part in large.allocate(x)] == [part.shape for part in parts]


@pytest.mark.parametrize(("rows", "columns"), [(0, 128), (128, 0), (-1, 1)])
def test_an_empty_block_is_refused(rows: int, columns: int) -> None:
    with pytest.raises(OptionError, match="at least 1 x 1"):
        fp8.block_format(rows, columns)


def test_names_and_rows_of_blocks() -> None:
    block = fp8.block_format(128, 64)
    assert (block.name, block.row_block) == ("fp8_block_128x64", 128)
    group = fp8.group_format(128)
    assert (group.name, group.row_block) == ("fp8_group_128", 1)
