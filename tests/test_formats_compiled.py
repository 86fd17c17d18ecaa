"""Every format compiled by Inductor: the same bits as eager, also with symbolic sizes."""

from __future__ import annotations

from functools import partial

import format_oracle as oracle
import pytest
import torch
from format_oracle import same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from omniq_compile.lowering import gpu_quantize
from omniq_compile.lowering.formats import fp8, mx, mxfp4, mxfp4_dualscale, mxfp8

FORMATS = [
    fp8.FORMAT, fp8.block_format(3, 24), fp8.group_format(48), mxfp8.FORMAT, mxfp4.FORMAT,
    mxfp4.UOS_FORMAT, mxfp4_dualscale.FORMAT, mxfp4_dualscale.UOS_FORMAT,
]  # fmt: skip
FAKES = [
    fp8.fake_quantize,
    partial(fp8.fake_quantize_group, columns=48),
    partial(fp8.fake_quantize_block, rows=3, columns=24),
    mxfp8.fake_quantize,
    partial(mxfp4.fake_quantize, scale_alg=mx.UOS),
    mxfp4_dualscale.fake_quantize,
]


# Those that differ by a scale rule alone compile alike.
COMPILED = [f for f in FORMATS if f not in (mxfp4.FORMAT, mxfp4_dualscale.UOS_FORMAT)]
# The codes of mxfp4_dualscale are packed as those of mxfp4, whose scale FAKES have: ten seconds.
QUANTIZED = [f for f in COMPILED if f is not mxfp4.UOS_FORMAT]


def quantize_all(x: torch.Tensor) -> list[torch.Tensor]:
    out = [part for format in QUANTIZED for part in format.quantize(x)]
    for fake in FAKES:
        result = fake(x)
        out.extend([result] if isinstance(result, torch.Tensor) else result)
    return out


def dequantize_all(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = list(parts)
    out = [fp8.codes_bfloat16(parts[0])]
    for format in COMPILED:
        own = [parts.pop(0) for _ in format.parts]
        out.append(format.dequantize(own))
        if format is mxfp8.FORMAT:
            out.append(mxfp8.dequantize_bfloat16(own))
        elif format is mxfp4.UOS_FORMAT:
            out.append(mxfp4.dequantize_bfloat16(own))
    return out


def test_compiled_equals_eager() -> None:
    kinds = [oracle.make(kind, (2, 550), torch.bfloat16, 1) for kind in oracle.KINDS]
    x = torch.cat(kinds)
    # A compiled loop may flush denormals, which then are zeros to both.
    x = x.where(x.abs() >= 1e-30, 0.0)
    eager = quantize_all(x)
    for actual, expected in zip(torch.compile(quantize_all, fullgraph=True)(x), eager, strict=True):
        assert same_bits(actual, expected)
    parts = [part for format in COMPILED for part in format.quantize(x)]
    compiled = torch.compile(dequantize_all, fullgraph=True)(parts)
    for actual, expected in zip(compiled, dequantize_all(parts), strict=True):
        assert same_bits(actual, expected)


def test_a_rounding_that_is_fused_away_moves_no_block_scale() -> None:
    """The cosines of a time embedding: just below 1, which is what they are in BF16."""

    def embed(angle: torch.Tensor) -> torch.Tensor:
        return angle.cos().to(torch.bfloat16)

    def quantized(angle: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = embed(angle)
        found = [f.quantize(x) for f in (mxfp8.FORMAT, mxfp4.FORMAT, mxfp4_dualscale.FORMAT)]
        values = [gpu_quantize.quantize_bfloat16(x, name)[0] for name in ("mxfp8", "mxfp4")]
        return *(scale for _, scale, *_ in found), mxfp8.fake_quantize(x), *values

    angle = torch.rand(64, 512, generator=torch.Generator().manual_seed(2)) * 0.05 + 0.002
    assert (angle.cos() < 1).all()
    x = embed(angle).double()
    *scales, eight, gpu_eight, gpu_four = torch.compile(quantized, fullgraph=True)(angle)
    for scale, expected in zip(scales, quantized(angle), strict=False):
        assert torch.equal(scale, expected)
    # Half of the scale would saturate at 0.875 and 0.75; 1 is a code of both formats.
    for values in (eight, gpu_eight, gpu_four):
        assert ((values.double() - x) / x).abs().amax() < 0.01


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_allocate_takes_fake_tensors_and_symbolic_sizes(format: fp8.Format) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.randn(6, 70))
    with mode:
        parts = format.allocate(x)
    expected = format.quantize(torch.randn(6, 70))
    for part, real in zip(parts, expected, strict=True):
        assert tuple(int(size) for size in part.shape) == real.shape
        assert part.dtype is real.dtype
