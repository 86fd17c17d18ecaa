"""AMD and Intel GPUs: every call of torch's GEMMs and of AITER against its record, and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_gemms
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import Holder, error
from format_oracle import make
from torch._subclasses import FakeTensorMode

import omniq_compile as omniq
from omniq_compile.lowering import gpu_quantize, reference, registry
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.rocm import aiter, fp8, mx
from omniq_compile.lowering.schemes import Scheme, get_scheme, w4a8
from omniq_compile.lowering.target import Target

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Beside full precision, of few products and with outliers.
LARGEST_ERROR = {"int8": 0.06, "fp8": 0.06, "mxfp8": 0.08, "mxfp4": 0.25}


@pytest.fixture(autouse=True)
def _others(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gemms.without_own_kernels(monkeypatch)


def problem(x: torch.Tensor, w: torch.Tensor, **changes: Any) -> Problem:
    values = {
        "M": x.shape[-2], "K": x.shape[-1], "N": w.shape[-2], "a_rank": x.dim(),
        "b_rank": w.dim(), "dtype": x.dtype,
    }  # fmt: skip
    return Problem(**(values | changes))


def kernel_named(target: str, name: str) -> tuple[Kernel, Scheme]:
    """Return a kernel of a target, and its method's scheme."""
    rows = registry.kernels_of(target.split(":")[0])
    kernel = next(k for k in rows if k.name == name and target.split(":")[1] in k.archs)
    return kernel, get_scheme(kernel.method)


def check_numbers(
    kernel: Kernel,
    scheme: Scheme,
    leading: tuple[int, ...],
    K: int,
    N: int,
    bias: torch.dtype | None,
    dtype: torch.dtype = BF16,
    bias_after: bool = False,
) -> None:
    """Compare a kernel with its formats' reference GEMM, and loosely with full precision."""
    x = make("outlier_channels", (*leading, K), dtype, K)
    w = make("normal", (N, K), dtype, N)
    x[..., 1:2, :] = 0
    b = None if bias is None else make("normal", (N,), bias, 1)
    case = problem(x, w)
    assert kernel.refuse(case, scheme) is None
    weight = get_format(scheme.weight).quantize(w)
    a = kernel.quantize(x, scheme.activation)
    out = kernel.gemm(a, kernel.arrange(weight), b, case, scheme)
    assert (out.shape, out.dtype) == ((*leading, N), dtype)
    # Which of two codes is taken midway between them is checked in test_gpu_quantize.py.
    activation = gpu_quantize.quantize(x, scheme.activation)
    if kernel.method == "fp8" and b is not None:
        b = b.to(BF16)  # what the operator takes
    formats = (scheme.activation, scheme.weight)
    exact = reference.gemm(activation, weight, b, *formats, torch.float64)
    products = exact if b is None else exact - b.double()
    size = exact.abs() + products.abs() * bias_after  # a rounding of its own
    slack = 1e-6 * exact.abs().max()
    assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * size + slack).all()
    full = x.double() @ w.double().t() + (0 if b is None else b.double())
    assert error(out, full) < LARGEST_ERROR[kernel.method]


@pytest.mark.parametrize(("leading", "bias"), [((37,), None), ((2, 5), BF16), ((1,), FP32)])
@pytest.mark.parametrize(
    ("target", "name", "called"),
    [
        ("xpu:xe", "xpu_fp8_scaled_mm", "row-wise e4m3fn"),
        ("rocm:gfx950", "rocm_fp8_scaled_mm", "row-wise e4m3fn"),
        ("rocm:gfx942", "rocm_fp8_fnuz_scaled_mm", "row-wise e4m3fnuz"),
    ],
)
def test_fp8_numbers(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    name: str,
    called: str,
    leading: tuple[int, ...],
    bias: torch.dtype | None,
) -> None:
    recorder = fake_gemms.install_torch(monkeypatch, target.split(":")[1])
    check_numbers(*kernel_named(target, name), leading, 208, 80, bias)
    assert [call.case for call in recorder.calls] == [called]


def test_every_e4m3_code_is_the_same_number_as_fnuz() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    (fnuz, scale) = fp8.to_fnuz((codes.unsqueeze(0), torch.tensor([3.0])))
    values = fnuz.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fnuz).astype(np.float64)
    expected = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    finite = np.isfinite(expected)
    assert finite.sum() == 254
    assert np.array_equal((values * scale.item())[0][finite], expected[finite] * 3.0)
    assert np.isfinite(values).all()


def test_two_activations_multiply_as_fnuz(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both come from the kernel's own quantizer, as fnuz already."""
    fake_gemms.install_torch(monkeypatch, "gfx942")
    kernel, scheme = kernel_named("rocm:gfx942", "rocm_fp8_fnuz_scaled_mm")
    x, y = torch.randn(5, 64, dtype=BF16), torch.randn(32, 64, dtype=BF16)
    parts = [kernel.quantize(operand, "fp8") for operand in (x, y)]
    out = kernel.gemm(*parts, None, problem(x, y, b_is_weight=False), scheme)
    fp8_parts = [get_format("fp8").quantize(operand) for operand in (x, y)]
    exact = reference.gemm(*fp8_parts, None, "fp8", "fp8", torch.float64)
    assert error(out, exact) < 3e-3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_bad_token_stays_alone_as_fnuz(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gemms.install_torch(monkeypatch, "gfx942")
    kernel, scheme = kernel_named("rocm:gfx942", "rocm_fp8_fnuz_scaled_mm")
    x, w = torch.randn(5, 64, dtype=BF16), torch.randn(32, 64, dtype=BF16)
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    weight = kernel.arrange(get_format("fp8").quantize(w))
    out = kernel.gemm(kernel.quantize(x, "fp8"), weight, None, problem(x, w), scheme)
    assert out.isfinite().all(dim=-1).tolist() == [True, False, False, True, True]
    assert not out[1:3].isfinite().any()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("target", "name", "leading", "K", "N"),
    [
        ("xpu:xe", "xpu_s8_int_mm", (1,), 75, 33),
        ("xpu:xe", "xpu_s8_int_mm", (2, 5), 51, 7),
        ("rocm:gfx942", "rocm_s8_int_mm", (37,), 72, 40),
        ("rocm:gfx950", "rocm_s8_int_mm", (3, 17), 72, 40),
        ("rocm:gfx950", "rocm_s8_int_mm", (16,), 72, 40),
        ("rocm:gfx942", "rocm_s8_int_mm", (1,), 136, 8),
        ("rocm:gfx942", "rocm_s8_int_mm", (2, 3, 5), 136, 8),
    ],
)
def test_int8_numbers(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    name: str,
    leading: tuple[int, ...],
    K: int,
    N: int,
    dtype: torch.dtype,
) -> None:
    recorder = fake_gemms.install_torch(monkeypatch, target.split(":")[1])
    check_numbers(*kernel_named(target, name), leading, K, N, dtype, dtype)
    assert [call.operator for call in recorder.calls] == ["_int_mm"]


@pytest.mark.parametrize(("leading", "bias"), [((37,), None), ((2, 5), BF16), ((1,), FP32)])
@pytest.mark.parametrize(
    ("scheme", "called"),
    [
        (get_scheme("mxfp8"), "1 x 32 e4m3"),
        (get_scheme("mxfp4"), "1 x 32 e2m1"),
        (get_scheme("mxfp4", scale_alg=2), "1 x 32 e2m1"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("K", "N"), [(384, 144), (250, 16)])
def test_mx_numbers_through_hipblaslt(
    monkeypatch: pytest.MonkeyPatch,
    scheme: Scheme,
    called: str,
    leading: tuple[int, ...],
    bias: torch.dtype | None,
    K: int,
    N: int,
) -> None:
    recorder = fake_gemms.install_torch(monkeypatch, "gfx950")
    kernel = {"mxfp8": mx.MXFP8, "mxfp4": mx.MXFP4}[scheme.method]
    for dtype in (BF16, FP16):
        check_numbers(kernel, scheme, leading, K, N, bias, dtype, bias_after=True)
    assert [call.case for call in recorder.calls] == [called, called]


@pytest.mark.parametrize(("leading", "bias"), [((37,), None), ((2, 130), BF16), ((1,), FP32)])
@pytest.mark.parametrize("scale_alg", [0, 2])
@pytest.mark.parametrize(("K", "N"), [(512, 160), (250, 32)])
def test_mxfp4_numbers_through_aiter(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    leading: tuple[int, ...],
    bias: torch.dtype | None,
    scale_alg: int,
    K: int,
    N: int,
) -> None:
    recorder = fake_gemms.install_aiter(monkeypatch, tmp_path, "gfx950")
    scheme = get_scheme("mxfp4", scale_alg=scale_alg)
    check_numbers(aiter.GEMM_A4W4, scheme, leading, K, N, bias, bias_after=True)
    operators = ["shuffle_weight", "e8m0_shuffle", "e8m0_shuffle", "gemm_a4w4"]
    assert [call.operator for call in recorder.calls] == operators


def test_two_activations_multiply_through_aiter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second is not arranged before, as a weight is."""
    fake_gemms.install_aiter(monkeypatch, tmp_path, "gfx950")
    scheme = get_scheme("mxfp4")
    x, y = torch.randn(5, 256, dtype=BF16), torch.randn(32, 256, dtype=BF16)
    parts = [get_format("mxfp4").quantize(operand) for operand in (x, y)]
    out = aiter.gemm(*parts, None, problem(x, y, b_is_weight=False), scheme)
    assert error(out, reference.gemm(*parts, None, "mxfp4", "mxfp4", torch.float64)) < 3e-3


def test_operands_of_other_strides_are_made_rows_for_aiter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_gemms.install_aiter(monkeypatch, tmp_path, "gfx950")
    parts = get_format("mxfp4").quantize(torch.randn(40, 256))
    weight = aiter.arrange(get_format("mxfp4").quantize(torch.randn(32, 256)))
    columns = [part.t().contiguous().t() for part in parts]
    expected = aiter.rocm_gemm_a4w4(*parts, *weight)
    assert torch.equal(aiter.rocm_gemm_a4w4(*columns, *weight), expected)


def test_operands_of_other_strides_are_made_rows_for_hipblaslt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gemms.install_torch(monkeypatch, "gfx950")
    parts, weight = (get_format("mxfp4").quantize(torch.randn(rows, 256)) for rows in (48, 32))
    columns = [part.t().contiguous().t() for part in parts]
    expected = mx.rocm_scaled_mm_1x32(*parts, *weight, BF16)
    assert torch.equal(mx.rocm_scaled_mm_1x32(*columns, *weight, BF16), expected)


def test_a_bias_that_is_added_after_is_not_rounded_before() -> None:
    out, bias = torch.tensor([-1.0], dtype=BF16), torch.tensor([1 + 2.0**-12])
    assert mx.add_bias(out, bias).tolist() == [2.0**-12]


X, W = torch.empty(64, 512, dtype=BF16), torch.empty(128, 512, dtype=BF16)
MIXED = w4a8(get_scheme("mxfp4"))


INT8, FP8, MXFP8, MXFP4 = (get_scheme(method) for method in ("int8", "fp8", "mxfp8", "mxfp4"))
BLOCKS = get_scheme("fp8", weight_block_size=(128, 128))
ACTIVATIONS = {"b_is_weight": False}


# Where it goes is named without its device.
@pytest.mark.parametrize(
    ("target", "scheme", "changes", "said", "name"),
    [
        ("rocm:gfx942", FP8, {"K": 520}, "K = 520 is not a multiple of 16", "fp8_float32"),
        ("rocm:gfx950", FP8, {"dtype": FP16}, "the result is float16", "fp8_float32"),
        ("xpu:xe", FP8, {"N": 40}, "N = 40 is not a multiple of 16", "fp8_float32"),
        ("xpu:xe", BLOCKS, {}, "has one per block", "fp8_float32"),
        ("rocm:gfx942", INT8, {"K": 60}, "K = 60 is not a multiple of 8", "s8_float32"),
        ("rocm:gfx942", INT8, {"N": 60}, "N = 60 is not a multiple of 8", "s8_float32"),
        ("rocm:gfx942", INT8, {"b_rank": 3}, "no batch of matrices", "s8_float32"),
        ("rocm:gfx950", MXFP8, {"K": 160}, "K = 160 in blocks of 32 is not a", "mxfp8_bfloat16"),
        ("rocm:gfx950", MXFP8, {"N": 40}, "N = 40 is not a multiple of 16", "mxfp8_bfloat16"),
        ("rocm:gfx950", MXFP8, ACTIVATIONS | {"N": "s0"}, "N = s0 is not a", "mxfp8_bfloat16"),
        ("rocm:gfx950", MXFP8, {"b_rank": 3}, "no batch of matrices", "mxfp8_bfloat16"),
        ("rocm:gfx950", MXFP8, {"dtype": FP32}, "the result is float32", "mxfp8_float32"),
        ("rocm:gfx950", MXFP4, {"K": 160}, "K = 160 in blocks of 32 is not a", "mxfp4_bfloat16"),
        ("rocm:gfx950", MIXED, {}, "one element type, not mxfp4 (mxfp8 x mx", "mxfp4_bfloat16"),
    ],
)
def test_what_an_operator_cannot_take_goes_to_the_next_kernel(
    target: str, scheme: Scheme, changes: dict[str, Any], said: str, name: str
) -> None:
    place = Target.parse(target)
    base = get_scheme(scheme.method)
    kernel, why = registry.choose(base, place, problem(X, W))
    assert kernel is not None
    assert kernel.native
    assert "AITER is not installed" in why or not why
    kernel, why = registry.choose(scheme, place, problem(X, W, **changes))
    assert said in why
    assert kernel is not None
    assert kernel.name == f"{place.device}_{name}"


@pytest.mark.parametrize(
    ("scheme", "changes", "said"),
    [
        (get_scheme("mxfp4"), {"N": 96}, "wrong for N = 96"),
        (get_scheme("mxfp4"), {"N": 80}, "N = 80 is not a multiple of 32"),
        (get_scheme("mxfp4"), {"K": 384}, "not a multiple of 256"),
        (get_scheme("mxfp4"), {"dtype": FP16}, "the result is float16"),
        (get_scheme("mxfp4"), {"b_rank": 3}, "no batch of matrices"),
        (get_scheme("mxfp4"), {"K": "s0", "b_is_weight": False}, "K = s0 in blocks of 32"),
        (get_scheme("mxfp4"), {"N": "s0", "b_is_weight": False}, "N = s0 is not a multiple"),
        (MIXED, {}, "takes e2m1 times e2m1"),
        # Both are e4m3 then.
        (MIXED, {"b_is_weight": False}, "takes e2m1 times e2m1"),
    ],
)
def test_what_aiter_cannot_take(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    scheme: Scheme,
    changes: dict[str, Any],
    said: str,
) -> None:
    assert aiter.refuse(problem(X, W), get_scheme("mxfp4")) == "AITER is not installed"
    fake_gemms.install_aiter(monkeypatch, tmp_path, "gfx950")
    assert aiter.refuse(problem(X, W), get_scheme("mxfp4")) is None
    assert said in str(aiter.refuse(problem(X, W, **changes), scheme))


def test_operators_keep_what_torch_library_asks_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_gemms.install_torch(monkeypatch, "gfx950")
    fake_gemms.install_aiter(monkeypatch, tmp_path, "gfx950")
    form = get_format("mxfp4")
    parts = (*form.quantize(torch.randn(2, 3, 256)), *form.quantize(torch.randn(32, 256)))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(mx.rocm_scaled_mm_1x32, (*parts, BF16), test_utils=checks)
    torch.library.opcheck(aiter.rocm_shuffle_a4w4, parts[2:], test_utils=checks)
    shuffled = (*parts[:2], *aiter.arrange(parts[2:]))
    torch.library.opcheck(aiter.rocm_gemm_a4w4, shuffled, test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("target", "method", "kernel", "written"),
    [
        ("xpu:xe", "int8", "xpu_s8_int_mm", "torch._int_mm("),
        ("xpu:xe", "fp8", "xpu_fp8_scaled_mm", "torch._scaled_mm("),
        ("rocm:gfx942", "int8", "rocm_s8_int_mm", "_int_mm("),
        ("rocm:gfx942", "fp8", "rocm_fp8_fnuz_scaled_mm", "float8_e4m3fnuz"),
        ("rocm:gfx950", "fp8", "rocm_fp8_scaled_mm", "torch._scaled_mm("),
        ("rocm:gfx950", "mxfp8", "rocm_mxfp8_scaled_mm", "omniq.rocm_scaled_mm_1x32"),
        ("rocm:gfx950", "mxfp4", "rocm_mxfp4_scaled_mm", "omniq.rocm_scaled_mm_1x32"),
    ],
)
def test_a_graph_is_lowered_here(
    target: str, method: str, kernel: str, written: str, dynamic: bool
) -> None:
    def forward(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, w, b)

    model = Holder(forward, w=torch.randn(384, 640, dtype=BF16), b=torch.randn(384, dtype=BF16))
    x = torch.randn(2, 33, 640, dtype=BF16)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    report = omniq.explain(model, [x], {"method": method}, target=target)
    assert [site.decision.kernel for site in report.sites] == [kernel]
    assert written in report.graphs[0].programs["lowered"]


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("xpu:xe", "xpu_fp8_scaled_mm"),
        ("xpu:xe", "xpu_s8_int_mm"),
        ("rocm:gfx950", "rocm_fp8_scaled_mm"),
        ("rocm:gfx942", "rocm_fp8_fnuz_scaled_mm"),
        ("rocm:gfx942", "rocm_s8_int_mm"),
        ("rocm:gfx950", "rocm_mxfp8_scaled_mm"),
        ("rocm:gfx950", "rocm_mxfp4_scaled_mm"),
    ],
)
def test_the_device_s_own_fakes_take_the_call(target: str, name: str) -> None:
    """torch's fakes check layouts and alignment by the device of a tensor, there or not."""
    kernel, scheme = kernel_named(target, name)
    device = Target.parse(target).torch_device
    with FakeTensorMode():
        x = torch.empty(2, 33, 640, dtype=BF16, device=device)
        w = torch.empty(48, 640, dtype=BF16, device=device)
        bias = torch.empty(48, dtype=BF16, device=device)
        form = get_format(scheme.activation)
        # A shift of bytes has no fake for a device that torch is not built for.
        parts = form.allocate(x) if kernel.method == "mxfp4" else kernel.quantize(x, form.name)
        weight = kernel.arrange(get_format(scheme.weight).allocate(w))
        out = kernel.gemm(parts, weight, bias, problem(x, w), scheme)
    assert (out.shape, out.dtype) == ((2, 33, 48), BF16)
    assert out.device.type == device
