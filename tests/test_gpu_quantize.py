"""Activations quantized for GPUs: to the parts that everyone makes, in shapes that fuse."""

from __future__ import annotations

import pytest
import torch

from omniq_compile.lowering import decoded_bfloat16, gpu_quantize
from omniq_compile.lowering.formats import get_format

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_those_of_the_format(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for x in activations(shape, dtype):
        for name in ("int8", "fp8", "fp8_group_128", "fp8_group_32", "mxfp8", "mxfp4"):
            found = gpu_quantize.quantize(x, name)
            for one, other in zip(found, get_format(name).quantize(x), strict=True):
                assert_same(one, other)
        for name in ("mxfp8", "mxfp4", "mxfp4_uos", "fp8"):
            found = gpu_quantize.quantize_bfloat16(x, name)
            for one, other in zip(found, decoded_bfloat16.quantize(x, name), strict=True):
                assert_same(one, other)


def test_what_is_stored_is_what_was_computed() -> None:
    for x in (torch.randn(3, 4, 5), torch.randn(5, 3).t(), torch.randn(2, 6)[:, ::2]):
        assert torch.equal(gpu_quantize.stored(x), x)
        assert gpu_quantize.stored(x).is_contiguous()
