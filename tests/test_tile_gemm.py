"""`omniq::cpu_tile_gemm`: the C++, and what stands in for it, against products in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from omniq_compile.lowering.cpu import decode, tile_gemm
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.lowering.formats import get_format, mx

gemm: Callable[..., Tensor] = torch.ops.omniq.cpu_tile_gemm
BUILT = tile_gemm._library() is not None
needs_bf16 = pytest.mark.skipif(not BUILT, reason="this CPU has no fast BF16 products")

# M, N and K: one tile and less, several, rows cut between threads, an odd K.
SHAPES = [(1, 1, 1), (7, 45, 1075), (130, 67, 1600), (700, 65, 96), (3, 200, 33)]


@pytest.fixture(params=[pytest.param("bfloat16", marks=needs_bf16), "float32", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "bfloat16":
        monkeypatch.setattr(tile_gemm, "_library", lambda: None)
        # Cuts each weight here into several tiles, the last one smaller.
        monkeypatch.setattr(tile_gemm, "TILE_ELEMENTS", 20_000)
    if request.param == "torch":
        monkeypatch.setattr(decode, "_library", lambda: None)
    return str(request.param)


def elements(count: int, kind: Any) -> Tensor:
    """Every code of a type of ml_dtypes from 0 on, decoded by it."""
    return torch.from_numpy(np.arange(count, dtype=np.uint8).view(kind).astype(np.float32))


def random_codes(shape: tuple[int, ...]) -> Tensor:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.where((codes & 0x7F) == 0x7F, 0, codes)


def close(out: Tensor, a: Tensor, b: Tensor, bias: Tensor, dtype: torch.dtype) -> bool:
    """Compare with float64, allowing one rounding and another order of accumulation."""
    exact = a.double() @ b.double().T + bias.double()
    size = a.double().abs() @ b.double().abs().T + bias.double().abs()
    step = torch.finfo(dtype).eps / 2
    return bool(((out.double() - exact).abs() <= exact.abs() * step * 1.001 + size * 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_a_scale_per_row(path: str, M: int, N: int, K: int, dtype: torch.dtype) -> None:
    a = torch.randn(M, K).to(torch.bfloat16)
    codes, bias = random_codes((N, K)), torch.randn(N)
    a_scale, b_scale = torch.rand(M).float() / 448, torch.rand(N).float()
    out = gemm(
        a, a_scale, codes.view(torch.float8_e4m3fn), None, b_scale, bias, 0, 1, 0, dtype
    )  # fmt: skip
    table = elements(256, ml_dtypes.float8_e4m3fn)
    assert out.dtype == dtype
    b = table[codes.long()].double() * b_scale[:, None]
    assert close(out, a.double() * a_scale[:, None], b, bias, dtype)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_another_default_dtype(path: str, default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        test_a_scale_per_row(path, 7, 45, 1075, torch.float32)
        test_a_power_of_two_per_block(path, 7, 45, 1075, "e2m1", True)
    finally:
        torch.set_default_dtype(before)


def test_a_caller_who_turned_onednn_off() -> None:
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        test_a_scale_per_row("float32", 7, 45, 1075, torch.bfloat16)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (64, 32), (1, 96), (7, 1024)])
@pytest.mark.parametrize(("M", "N", "K"), [*SHAPES, (7, 45, 128)])  # of one group, and many blocks
def test_a_scale_per_block(path: str, M: int, N: int, K: int, rows: int, columns: int) -> None:
    a = torch.randn(M, K).to(torch.bfloat16)
    codes, bias = random_codes((N, K)), torch.randn(N)
    a_scale = torch.rand(M, -(-K // 128)) / 448
    b_scale = torch.rand(-(-N // rows), -(-K // columns))
    out = gemm(
        a, a_scale, codes.view(torch.float8_e4m3fn), None, b_scale, bias, 128, rows, columns,
        torch.float32,
    )  # fmt: skip
    n, k = torch.arange(N) // rows, torch.arange(K)
    b = elements(256, ml_dtypes.float8_e4m3fn)[codes.long()].double()
    b = b * b_scale[n][:, k // columns]
    assert close(out, a.double() * a_scale[:, k // 128], b, bias, torch.float32)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_a_power_of_two_per_block(
    path: str, M: int, N: int, K: int, element: str, coarse: bool
) -> None:
    K = mx.padded(K)
    a = torch.randn(M, K).to(torch.bfloat16)
    bias, byte = torch.randn(N), torch.randint(110, 140, (N, K // 32), dtype=torch.uint8)
    if element == "e4m3":
        codes = random_codes((N, K))
        values = elements(256, ml_dtypes.float8_e4m3fn)[codes.long()]
        codes = codes.view(torch.float8_e4m3fn)
    else:
        codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
        table = elements(16, ml_dtypes.float4_e2m1fn)
        values = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], -1)
        values = values.flatten(-2)
    b = values.double() * 2.0 ** (byte.double() - 127).repeat_interleave(32, -1)
    real, a_scale, b_scale, columns = a.double(), None, None, 0
    if coarse:
        columns, at = 512, torch.arange(K) // 512
        a_scale, b_scale = (torch.rand(size, -(-K // 512)).float() for size in (M, N))
        real, b = real * a_scale[:, at], b * b_scale[:, at]
    out = gemm(a, a_scale, codes, byte, b_scale, bias, columns, 1, columns, torch.float32)
    assert close(out, real, b, bias, torch.float32)


def test_every_code_and_every_scale_decodes_exactly(path: str) -> None:
    eye = torch.eye(32).to(torch.bfloat16)
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)
    finite = torch.where((codes & 0x7F) == 0x7F, 0, codes)
    one = torch.full((8, 1), 127, dtype=torch.uint8)
    out = gemm(eye, None, finite.view(torch.float8_e4m3fn), one, None, None, 0, 1, 0, torch.float32)
    table = elements(256, ml_dtypes.float8_e4m3fn)
    assert torch.equal(out.T, table[finite.long()])

    # Every scale byte with the code of 1.0, where 2**-127 is a denormal that may be flushed.
    byte = torch.arange(1, 255, dtype=torch.uint8).unsqueeze(1)
    ones = torch.full((254, 16), 0x22, dtype=torch.uint8)
    out = gemm(eye, None, ones, byte, None, None, 0, 1, 0, torch.float32)
    assert torch.equal(out[3].double(), 2.0 ** (byte[:, 0].double() - 127))


@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
def test_every_code_beside_every_scale(path: str, element: str) -> None:
    """Products that are normal numbers; others may be flushed, or are infinite."""
    if element == "e4m3":
        codes = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
        table = elements(256, ml_dtypes.float8_e4m3fn)
    else:
        codes = torch.arange(16, dtype=torch.uint8).repeat(255, 2)
        table = elements(16, ml_dtypes.float4_e2m1fn)
    byte = torch.arange(255, dtype=torch.uint8).unsqueeze(1)
    exact = table.double()[codes.long()] * 2.0 ** (byte.double() - 127)
    normal = (exact.abs() >= 2.0**-126) & (exact.abs() < 2.0**128)
    codes = torch.where(normal, codes, 0)

    eye = torch.eye(codes.shape[1]).to(torch.bfloat16)
    byte = byte.repeat(1, codes.shape[1] // 32)
    if element == "e4m3":
        stored = codes.view(torch.float8_e4m3fn)
    else:
        stored = codes[:, ::2] | codes[:, 1::2] << 4
    out = gemm(eye, None, stored, byte, None, None, 0, 1, 0, torch.float32)
    assert normal.sum() > 0.8 * normal.numel()
    assert torch.equal(out.T.double(), torch.where(normal, exact, 0))


def test_what_is_not_a_number_stays_where_it_is(path: str) -> None:
    a = torch.ones(5, 64, dtype=torch.bfloat16)
    a[2, 7] = torch.nan
    codes = torch.full((70, 32), 0x22, dtype=torch.uint8)
    byte = torch.full((70, 2), 127, dtype=torch.uint8)
    byte[66, 1] = 255
    out = gemm(a, None, codes, byte, None, None, 0, 1, 0, torch.bfloat16)
    expected = torch.full((5, 70), 64.0)
    expected[2], expected[:, 66] = torch.nan, torch.nan
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num().float(), expected.nan_to_num())


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_code_that_is_no_number_stays_where_it_is(path: str, code: int, blocks: bool) -> None:
    codes = torch.full((70, 64), 0x38, dtype=torch.uint8)
    codes[66, 40] = code
    byte = torch.full((70, 2), 127, dtype=torch.uint8) if blocks else None
    scales = (None, None) if blocks else (torch.ones(5), torch.ones(70))
    a, stored = torch.ones(5, 64, dtype=torch.bfloat16), codes.view(torch.float8_e4m3fn)
    out = gemm(a, scales[0], stored, byte, scales[1], None, 0, 1, 0, torch.float32)
    expected = torch.full((5, 70), 64.0)
    expected[:, 66] = torch.nan
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.skipif(sys.platform == "win32", reason="pages are protected by mprotect")
def test_nothing_is_read_beyond_an_operand() -> None:
    """Where memory ends behind it; what is read there and not used shows in no result."""
    script = Path(__file__).with_name("guarded_memory.py")
    said = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300
    )
    assert said.returncode == 0, said.stderr
    assert ("multiplied in bfloat16" in said.stdout) == BUILT
    assert "multiplied in float32" in said.stdout


def test_batches_strides_and_nothing_at_all(path: str) -> None:
    form = get_format("mxfp8")
    b = form.quantize(torch.randn(70, 64))
    a = torch.randn(64, 3, 2).to(torch.bfloat16).permute(1, 2, 0)
    out = gemm(a, None, b[0], b[1], None, None, 0, 1, 0, torch.float32)
    assert out.shape == (3, 2, 70)
    flat = a.reshape(6, 64)
    assert close(out.view(6, 70), flat, form.dequantize(b), torch.zeros(70), torch.float32)
    empty = gemm(a[:, :0], None, b[0], b[1], None, None, 0, 1, 0, torch.float32)
    assert empty.shape == (3, 0, 70)


@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
def test_operands_with_gaps_in_their_memory_are_read_as_they_are(path: str, element: str) -> None:
    K = 1056
    byte = torch.randint(110, 140, (45, K // 32), dtype=torch.uint8)
    codes, columns = torch.randint(0, 256, (45, K // 2), dtype=torch.uint8), 512
    if element == "e4m3":
        codes = random_codes((45, K))
    scales = [torch.rand(size, 3) for size in (7, 45)]
    a, bias = torch.randn(7, K).to(torch.bfloat16), torch.randn(45)
    operands = [a, scales[0], codes, byte, scales[1], bias]

    def multiply(operands: list[Tensor]) -> Tensor:
        if element == "e4m3":
            operands[2] = operands[2].view(torch.float8_e4m3fn)
        return gemm(*operands, columns, 1, columns, torch.float32)

    gaps = [operand.repeat_interleave(2, -1)[..., ::2] for operand in operands]
    assert not any(operand.is_contiguous() for operand in gaps)
    assert torch.equal(multiply(gaps), multiply(operands))


def test_autocast_does_not_round_the_sums(path: str) -> None:
    b = get_format("mxfp8").quantize(torch.randn(45, 96))
    arguments = (torch.randn(7, 96).bfloat16(), None, *b, None, None, 0, 1, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = gemm(*arguments)
    assert torch.equal(out, gemm(*arguments))


@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (7, 0), (64, 32), (7, 1024)])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_scales_of_the_weight_alone(
    path: str, M: int, N: int, K: int, rows: int, columns: int
) -> None:
    a, bias = torch.randn(M, K).to(torch.bfloat16), torch.randn(N)
    codes, scale = random_codes((N, K)), torch.rand(-(-N // rows), -(-K // (columns or K))).float()
    stored = codes.view(torch.float8_e4m3fn)
    out = gemm(a, None, stored, None, scale, bias, columns, rows, columns, torch.bfloat16)
    b_scale = scale.repeat_interleave(rows, 0)[:N].repeat_interleave(columns or K, 1)[:, :K]
    b = elements(256, ml_dtypes.float8_e4m3fn)[codes.long()].double() * b_scale.double()
    assert close(out, a, b, bias, torch.bfloat16)


def test_scales_of_activations_alone_are_an_error(path: str) -> None:
    codes, a = random_codes((45, 70)).view(torch.float8_e4m3fn), torch.ones(3, 70).bfloat16()
    with pytest.raises(OmniqError, match="a has scales, and b has none"):
        gemm(a, torch.ones(3), codes, None, None, None, 0, 1, 0, torch.float32)


@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 5)])
def test_no_rows_with_scales_of_their_own(path: str, leading: tuple[int, ...]) -> None:
    codes = random_codes((45, 70)).view(torch.float8_e4m3fn)
    a, a_scale, b_scale = torch.ones(*leading, 70).bfloat16(), torch.ones(leading), torch.ones(45)
    out = gemm(a, a_scale, codes, None, b_scale, None, 0, 1, 0, torch.bfloat16)
    assert (out.shape, out.dtype) == ((*leading, 45), torch.bfloat16)


@pytest.mark.parametrize("shape", [(1,), (44,), (46,), (1, 45), ()])
def test_a_bias_of_other_than_n_elements_is_an_error(path: str, shape: tuple[int, ...]) -> None:
    codes, a = random_codes((45, 70)).view(torch.float8_e4m3fn), torch.ones(3, 70).bfloat16()
    with pytest.raises(OmniqError, match=r"cpu_tile_gemm: the bias is .* N = 45 columns.*expand"):
        gemm(
            a, torch.ones(3), codes, None, torch.ones(45), torch.ones(shape), 0, 1, 0, torch.float32
        )  # fmt: skip


@needs_bf16
def test_an_error_of_the_library_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        @staticmethod
        def omniq_tile_gemm(arguments: Any, message: Any, size: Any) -> int:
            message.value = b"no memory"
            return 1

    monkeypatch.setattr(tile_gemm, "_library", lambda: Failing)
    b = get_format("mxfp8").quantize(torch.randn(70, 64))
    with pytest.raises(RuntimeError, match=r"^no memory$"):
        gemm(torch.ones(2, 64).bfloat16(), None, b[0], b[1], None, None, 0, 1, 0, torch.float32)
