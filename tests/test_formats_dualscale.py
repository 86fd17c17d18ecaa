"""mxfp4_dualscale: exact by its definition, and what its coarse scale gains over mxfp4."""

from __future__ import annotations

import format_oracle as oracle
import numpy as np
import pytest
import torch
from format_oracle import same_bits
from gpu_division import GpuDivision
from hypothesis import given, settings
from hypothesis import strategies as st

from omniq_compile.lowering.formats import mx, mxfp4, mxfp4_dualscale
from omniq_compile.lowering.formats.format import Format

FORMATS = [mxfp4_dualscale.FORMAT, mxfp4_dualscale.UOS_FORMAT]
ALGORITHMS = {"mxfp4_dualscale": mx.OCP, "mxfp4_dualscale_uos": mx.UOS}
by_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


@by_format
@given(
    rows=st.integers(1, 3),
    K=st.integers(1, 1200),
    kind=st.sampled_from(oracle.KINDS),
    dtype=st.sampled_from(oracle.DTYPES),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=100, deadline=None)
def test_equal_to_the_definition(
    format: Format, rows: int, K: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    x = oracle.make(kind, (rows, K), dtype, seed)
    real = x.float().numpy()
    starts = range(0, K, 512)
    coarse = np.stack([np.abs(real[:, k : k + 512]).max(1) for k in starts], 1) / np.float32(6)
    spread = np.repeat(coarse, 512, 1)[:, :K]
    divided = real / np.where(spread == 0, np.float32(1), spread)
    uos = format is mxfp4_dualscale.UOS_FORMAT
    expected_codes, expected_scale, values = oracle.mx(divided, oracle.E2M1, uos)
    parts = format.quantize(x)
    assert np.array_equal(parts[0].numpy(), oracle.pack(expected_codes))
    assert np.array_equal(parts[1].numpy(), expected_scale)
    assert np.array_equal(parts[2].numpy(), coarse)
    decoded = format.dequantize(parts)
    whole = np.repeat(coarse, 512, 1)[:, : values.shape[1]]
    assert same_bits(decoded, torch.from_numpy(values * whole))
    assert decoded.isfinite().all()
    fake, same_coarse = mxfp4_dualscale.fake_quantize(x, ALGORITHMS[format.name])
    assert same_bits(fake, torch.from_numpy(values))
    assert same_bits(same_coarse, parts[2])
    assert same_bits(mxfp4_dualscale.apply_coarse(fake, same_coarse), decoded)


@by_format
@pytest.mark.parametrize("shape", [(512,), (0, 512), (2, 3, 5, 700), (2, 0, 33), (3, 1)])
def test_leading_dimensions(format: Format, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    parts = format.quantize(x)
    for allocated, part in zip(format.allocate(x), parts, strict=True):
        assert (allocated.shape, allocated.dtype) == (part.shape, part.dtype)
    for part, row in zip(parts, format.quantize(x.reshape(-1, shape[-1])), strict=True):
        assert same_bits(part.reshape(row.shape), row)


@by_format
@pytest.mark.parametrize(("N", "K"), [(3, 512), (16, 1024), (5, 1), (7, 700)])
def test_nbytes_are_those_of_the_parts(format: Format, N: int, K: int) -> None:
    parts = format.quantize(torch.randn(N, K))
    assert format.nbytes(N, K) == sum(part.nbytes for part in parts)


@by_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_stays_in_its_run(format: Format, bad: float) -> None:
    x = torch.randn(3, 1100)
    good = format.dequantize(format.quantize(x))
    x[1, 600] = bad
    decoded = format.dequantize(format.quantize(x))
    assert not decoded[1, 512:1024].isfinite().any()
    decoded[1, 512:1024] = good[1, 512:1024]
    assert same_bits(decoded, good)
    assert format.dequantize(format.quantize(torch.zeros(2, 600))).eq(0).all()


@by_format
@pytest.mark.parametrize("units", [-2, -1, 0, 1, 2, None])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_no_division_of_a_gpu_changes_a_block_scale(
    format: Format, units: int | None, dtype: torch.dtype, bits: int
) -> None:
    """With every significand of a run's amax, and blocks' at 4 and 3.625 coarse and beside."""
    largest = torch.arange(2 ** (bits - 1), 2**bits)
    jumps = torch.stack([largest * 2 / 3, largest * 29 / 48], dim=-1).to(dtype)
    beside = [(jumps.view(torch.int16) + step).view(dtype) for step in (-1, 0, 1)]
    x = torch.zeros(len(largest), mxfp4_dualscale.BLOCKS_A_RUN, mx.BLOCK, dtype=dtype)
    x[:, :7, 5] = torch.cat([largest.to(dtype).unsqueeze(-1), *beside], dim=-1)
    parts = format.quantize(x.flatten(-2))
    with GpuDivision(units):
        _, scale, coarse = format.quantize(x.flatten(-2))
    assert torch.equal(scale, parts[1])
    assert torch.allclose(coarse, parts[2], rtol=1.2e-7, atol=0)


@by_format
@pytest.mark.parametrize("power", [0, -126])
@pytest.mark.parametrize("bits", [16, 24])
def test_a_block_of_float32_at_a_jump_is_scaled_as_defined(
    format: Format, power: int, bits: int
) -> None:
    """Down to denormals, and by coarse scales of few bits and of many."""
    significand = torch.randint(2 ** (bits - 1), 2**bits, (512, 1)) | 1
    coarse = torch.ldexp(significand.float(), torch.tensor(power - bits + 1))
    x = torch.zeros(512, mxfp4_dualscale.BLOCKS_A_RUN, mx.BLOCK)
    x[:, 0, :1] = 6 * coarse
    for block in range(1, mxfp4_dualscale.BLOCKS_A_RUN):
        x[:, block, :1] = (4, 3.625)[block % 2] * coarse * 2.0 ** (1 - block)
    x = x.flatten(-2)
    divided = (x / (x[:, :1] / 6)).numpy()
    codes, scale, _ = oracle.mx(divided, oracle.E2M1, format is mxfp4_dualscale.UOS_FORMAT)
    parts = format.quantize(x)
    assert np.array_equal(parts[1].numpy(), scale)
    assert np.array_equal(parts[0].numpy(), oracle.pack(codes))


def error(format: Format, x: torch.Tensor) -> float:
    """The relative error of each row, averaged, so that no row's magnitude decides."""
    difference = (format.dequantize(format.quantize(x)) - x).double()
    return (difference.norm(dim=1) / x.double().norm(dim=1)).mean().item()


def draw(name: str, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    shape = (256, 3072)
    x = rng.standard_normal(shape)
    if name.startswith("student_t2"):
        x = rng.standard_t(2, shape)
    elif name == "cauchy":
        x = rng.standard_cauchy(shape)
    elif name.startswith("outlier_channels"):
        x[:, rng.choice(3072, 6, replace=False)] *= 50
    elif name == "sparse_outliers":
        x[rng.random(shape) < 1e-3] *= 50
    if name.endswith("pooled"):
        x *= rng.lognormal(0, 2, (256, 1))
    return torch.from_numpy(x).float()


HEAVY = (
    "student_t2", "student_t2_pooled", "cauchy", "outlier_channels", "outlier_channels_pooled",
    "sparse_outliers",
)  # fmt: skip


@pytest.mark.parametrize("name", HEAVY)
def test_the_coarse_scale_gains_on_heavy_tails(name: str) -> None:
    x = draw(name, 0)
    plain = error(mxfp4.FORMAT, x)
    assert error(mxfp4_dualscale.FORMAT, x) < 0.9 * plain
    assert error(mxfp4_dualscale.UOS_FORMAT, x) < 0.87 * plain


@pytest.mark.parametrize("name", ["gaussian", "gaussian_pooled"])
def test_a_gaussian_is_nearly_a_tie(name: str) -> None:
    x = draw(name, 0)
    plain = error(mxfp4.FORMAT, x)
    assert abs(error(mxfp4_dualscale.FORMAT, x) / plain - 1) < 0.01
    assert error(mxfp4_dualscale.UOS_FORMAT, x) < 0.975 * plain
