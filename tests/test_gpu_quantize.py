"""Activations quantized for GPUs: to the parts that everyone makes, in shapes that fuse."""

from __future__ import annotations

import pytest
import torch

from omniq_compile.lowering import decoded_bfloat16, gpu_quantize, materialized
from omniq_compile.lowering.formats import block_size, get_format

SHAPES = [(3, 5, 256), (7, 200), (2, 96), (4, 640), (1, 1024)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def activations(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return one with zeros and a NaN, and one whose rows are not contiguous."""
    x = torch.randn(shape).to(dtype)
    x[..., 0, :] = 0
    x.view(-1)[-3] = torch.nan
    return [x, x.mT.contiguous().mT]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    nan = expected.float().isnan()
    assert torch.equal(found.float().isnan(), nan)
    assert torch.equal(found.view(kind)[~nan], expected.view(kind)[~nan])


def assert_nearest(codes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, name: str) -> None:
    """Check that no other code is nearer to ``x / scale``, or a millionth of it further at most."""
    every = torch.arange(256, dtype=torch.uint8).view(codes.dtype).double()
    every = every[every.isfinite() & (every != -128)]
    _, columns = block_size(name) or (1, x.shape[-1])
    per_row = scale.unsqueeze(-1) if scale.dim() < x.dim() else scale
    repeated = per_row.repeat_interleave(columns, -1)[..., : x.shape[-1]].double()
    real = torch.where(repeated == 0, 0, x.double() / repeated)
    known = real.isfinite()
    nearest = (every - real[known].unsqueeze(-1)).abs().amin(-1)
    distance = (codes.double() - real)[known].abs()
    assert (distance <= nearest + 1e-6 * real[known].abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_those_of_the_format(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for x in activations(shape, dtype):
        for name in ("int8", "fp8", "fp8_group_128", "fp8_group_32"):
            codes, scale = gpu_quantize.quantize(x, name)
            expected_codes, expected_scale = get_format(name).quantize(x)
            assert (codes.shape, codes.dtype) == (expected_codes.shape, expected_codes.dtype)
            assert_same(scale, expected_scale)
            assert torch.equal(codes.float().isnan(), expected_codes.float().isnan())
            assert_nearest(codes, scale, x, name)
        for name in ("mxfp8", "mxfp4"):
            found = gpu_quantize.quantize(x, name)
            for one, other in zip(found, get_format(name).quantize(x), strict=True):
                assert_same(one, other)
        for name in ("mxfp8", "mxfp4", "mxfp4_uos", "fp8"):
            found = gpu_quantize.quantize_bfloat16(x, name)
            for one, other in zip(found, decoded_bfloat16.fake_quantize(x, name), strict=True):
                assert_same(one, other)


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_group_32"])
def test_rows_of_any_size_reach_the_last_code(name: str) -> None:
    last = {"int8": 127.0}.get(name, 448.0)
    # From below the smallest scale that is a normal float32 to the largest numbers.
    for exponent in (-126, -120, -100, -30, 0, 40, 126):
        x = torch.rand(64, 32) * 2.0**exponent
        codes, scale = gpu_quantize.quantize(x, name)
        group = scale.reshape(-1) >= torch.finfo(torch.float32).tiny
        assert group.all() == (exponent > -120)
        amax = codes.double().abs().amax(-1)
        assert torch.equal(amax, torch.where(group, last, 0.0).double())
        assert_nearest(codes[group], scale[group], x[group], name)
    infinite = torch.tensor([[1.0, -torch.inf] * 16])
    codes, scale = gpu_quantize.quantize(infinite, name)
    assert scale.isinf().all()
    assert (codes[:, ::2].float() == 0).all()


def test_blocks_keep_signs_edges_and_nan() -> None:
    x = torch.zeros(1, 6 * 32)
    x[0, 1], x[0, 33], x[0, 40] = -0.0, torch.nan, 3.0
    x[0, 64], x[0, 70] = -torch.inf, 1.0
    x[0, 96:128] = torch.linspace(-1.9, 1.9, 32) * 2.0**127
    x[0, 128:160] = torch.linspace(-1.9, 1.9, 32) * 2.0**-126
    x[0, 160:192] = torch.linspace(-6.5, 7.9, 32)
    for name in ("mxfp8", "mxfp4", "mxfp4_uos"):
        (found,) = gpu_quantize.quantize_bfloat16(x, name)
        (expected,) = decoded_bfloat16.fake_quantize(x, name)
        assert found.isnan().sum() == 64
        assert_same(found, expected)


def test_what_is_stored_is_what_was_computed() -> None:
    for x in (torch.randn(3, 4, 5), torch.randn(5, 3).t(), torch.randn(2, 6)[:, ::2]):
        assert torch.equal(materialized.stored(x), x)
        assert materialized.stored(x).is_contiguous()
