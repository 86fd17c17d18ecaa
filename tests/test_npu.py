"""Ascend NPUs: every call of torch_npu against its record, and the numbers that come out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import fake_torch_npu
import pytest
import torch
from conftest import Holder, error
from format_oracle import make
from operator_recorder import Recorder

import omniq_compile as omniq
from omniq_compile.lowering import reference, registry
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.npu import operators
from omniq_compile.lowering.registry import Kernel, Problem
from omniq_compile.lowering.schemes import Scheme, get_scheme, w4a8
from omniq_compile.lowering.target import Target

BF16, FP16 = torch.bfloat16, torch.float16
SCHEMES = {
    "int8": get_scheme("int8"),
    "mxfp8": get_scheme("mxfp8"),
    "mxfp4": get_scheme("mxfp4"),
    "mxfp4 uos": get_scheme("mxfp4", scale_alg=2),
    "mxfp4 w4a8": w4a8(get_scheme("mxfp4")),
    "dualscale": get_scheme("mxfp4_dualscale"),
    "dualscale uos": get_scheme("mxfp4_dualscale", scale_alg=2),
}
by_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Put a recording torch_npu in place, of an Ascend 950."""
    module, recorder = fake_torch_npu.install("ascend950")
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    return recorder


def native(scheme: Scheme, arch: str = "ascend950") -> Kernel:
    kernel = registry.candidates(scheme.method, Target("npu", arch))[0]
    assert kernel.native
    return kernel


def problem(x: torch.Tensor, w: torch.Tensor, **changes: Any) -> Problem:
    values = {
        "M": x.shape[-2], "K": x.shape[-1], "N": w.shape[-2], "a_rank": x.dim(),
        "b_rank": w.dim(), "dtype": x.dtype,
    }  # fmt: skip
    return Problem(**(values | changes))


# Ragged M, N and K; more dimensions; each dtype of a bias, and none.
SHAPES = [
    ((37,), 192, 75, BF16, None),
    ((2, 5), 1075, 33, BF16, BF16),
    ((3, 1, 2), 50, 17, FP16, torch.float32),
    ((1,), 640, 1, FP16, FP16),
    ((6,), 576, 9, BF16, torch.float32),
    ((5,), 75, 20, FP16, BF16),  # three blocks: an odd number of scales
]


@by_scheme
@pytest.mark.parametrize(("leading", "K", "N", "dtype", "bias"), SHAPES)
def test_numbers_are_the_formats(
    recorder: Recorder,
    scheme: Scheme,
    leading: tuple[int, ...],
    K: int,
    N: int,
    dtype: torch.dtype,
    bias: torch.dtype | None,
) -> None:
    kernel = native(scheme)
    x = make("outlier_channels", (*leading, K), dtype, K)
    w = make("normal", (N, K), dtype, N)
    x[..., 1:2, :] = 0
    # So large that a float32 bias which is rounded before it is added shows.
    b = None if bias is None else 16 * make("normal", (N,), bias, 1)
    case = problem(x, w)
    mixed = scheme.activation != scheme.weight
    if scheme.method == "mxfp4" and K == 75:
        assert "pairs of blocks" in str(kernel.refuse(case, scheme))
        return
    if mixed and dtype is FP16:
        assert "not to float16" in str(kernel.refuse(case, scheme))
        return
    assert kernel.refuse(case, scheme) is None
    a_parts, b_parts = kernel.quantize(x, scheme.activation), get_format(scheme.weight).quantize(w)
    out = kernel.gemm(a_parts, kernel.arrange(b_parts), b, case, scheme)
    assert out.shape == (*leading, N)
    assert out.dtype is dtype
    formats = (scheme.activation, scheme.weight)
    # The mixed mode takes a bias of the result's dtype alone.
    taken = b.to(dtype) if mixed and b is not None else b
    exact = reference.gemm(a_parts, b_parts, taken, *formats, torch.float64)
    # Half a unit in the last place, and what float32 scales leave of a sum that cancels.
    slack = 1e-6 * exact.abs().max()
    assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + slack).all()
    full = x.double() @ w.double().t() + (0 if b is None else b.double())
    assert error(out, full) < {"int8": 0.05, "mxfp8": 0.05}.get(scheme.method, 0.25)


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "mxfp4 w4a8"])
def test_two_activations_multiply(recorder: Recorder, name: str) -> None:
    """The second is not arranged before, as a weight is, and may be transposed."""
    scheme = SCHEMES[name]
    kernel, format = native(scheme), scheme.activation
    x, y = torch.randn(5, 1088, dtype=BF16), torch.randn(1088, 33, dtype=BF16).t()
    case = problem(x, y, b_is_weight=False)
    assert kernel.refuse(case, scheme) is None
    parts = [kernel.quantize(operand, format) for operand in (x, y)]
    out = kernel.gemm(*parts, None, case, scheme)
    assert error(out, reference.gemm(*parts, None, format, format, torch.float64)) < 3e-3


@by_scheme
@pytest.mark.parametrize(("leading", "K", "dtype"), [case[:2] + case[3:4] for case in SHAPES])
def test_parts_are_the_formats(
    recorder: Recorder, scheme: Scheme, leading: tuple[int, ...], K: int, dtype: torch.dtype
) -> None:
    x = make("outlier_channels", (*leading, K), dtype, K)
    x[..., 1:2, :] = 0
    mine = native(scheme).quantize(x, scheme.activation)
    expected = get_format(scheme.activation).quantize(x)
    for part, format in zip(mine, expected, strict=True):
        assert (part.dtype, part.shape) == (format.dtype, format.shape)
        if scheme.activation != "mxfp4_dualscale":
            assert torch.equal(part.view(torch.uint8), format.view(torch.uint8))
    if scheme.activation == "mxfp4_dualscale":
        # The operator rounds once more, which moves few codes: by less than the format's own error.
        decode = get_format(scheme.activation).dequantize
        values = decode(expected)[..., :K]
        assert torch.equal(mine[2], expected[2])
        assert error(decode(mine)[..., :K], values) < error(values, x)


def test_the_dual_level_quantizer_makes_the_published_vector(recorder: Recorder) -> None:
    """512 times 8.0, as Ascend/op-plugin's test_npu_dynamic_dual_level_mx_quant expects it."""
    codes, scale, coarse = operators.npu_dynamic_dual_level_mx_quant(
        torch.full((1, 512), 8.0, dtype=BF16)
    )
    assert codes.eq(0x77).all()
    assert scale.eq(127).all()
    assert coarse.item() == pytest.approx(1.333333)


def operator_names(recorder: Recorder) -> list[tuple[str, str]]:
    return [(call.operator, call.case) for call in recorder.calls]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8", [("npu_dynamic_quant", "int8 per token"),
                  ("npu_quant_matmul", "int8, a scale per token and per column")]),
        ("mxfp8", [("npu_dynamic_mx_quant", "e4m3"), ("npu_quant_matmul", "mxfp8")]),
        ("mxfp4", [("npu_dynamic_mx_quant", "e2m1"), ("npu_quant_matmul", "mxfp4")]),
        ("mxfp4 uos", [("npu_dynamic_mx_quant", "e2m1, UOS"), ("npu_quant_matmul", "mxfp4")]),
        ("mxfp4 w4a8", [("npu_dynamic_mx_quant", "e4m3"),
                        ("npu_quant_matmul", "mxfp4 with mxfp8 activations")]),
        ("dualscale", [("npu_dynamic_dual_level_mx_quant", "e2m1"),
                       ("npu_format_cast", "packed e2m1 to FRACTAL_NZ"),
                       ("npu_dual_level_quant_matmul", "e2m1")]),
        ("dualscale uos", [("npu_format_cast", "packed e2m1 to FRACTAL_NZ"),
                           ("npu_dual_level_quant_matmul", "e2m1")]),
    ],
)  # fmt: skip
def test_each_scheme_calls_these_operators(
    recorder: Recorder, name: str, expected: list[tuple[str, str]]
) -> None:
    scheme = SCHEMES[name]
    x, w = torch.randn(7, 128, dtype=BF16), torch.randn(9, 128, dtype=BF16)
    kernel = native(scheme)
    parts = kernel.arrange(get_format(scheme.weight).quantize(w))
    kernel.gemm(kernel.quantize(x, scheme.activation), parts, None, problem(x, w), scheme)
    assert sorted(operator_names(recorder)) == sorted(expected)


@by_scheme
@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_no_rows_need_no_operator(
    recorder: Recorder, scheme: Scheme, leading: tuple[int, ...]
) -> None:
    kernel, w = native(scheme), torch.randn(9, 128, dtype=BF16)
    x = torch.randn(*leading, 128, dtype=BF16)
    weight = kernel.arrange(get_format(scheme.weight).quantize(w))
    asked = len(recorder.calls)
    a = kernel.quantize(x, scheme.activation)
    out = kernel.gemm(a, weight, None, problem(x, w), scheme)
    assert (out.shape, out.dtype) == ((*leading, 9), BF16)
    assert len(recorder.calls) == asked
    for part, format in zip(a, get_format(scheme.activation).quantize(x), strict=True):
        assert (part.dtype, part.shape) == (format.dtype, format.shape)


@by_scheme
def test_an_activation_that_autocast_would_cast_is_cast(recorder: Recorder, scheme: Scheme) -> None:
    """`torch.nn.functional.linear` multiplies in bfloat16 then, and its input is in float32."""
    x = torch.randn(7, 128)
    wide, cast = (native(scheme).quantize(of, scheme.activation) for of in (x, x.to(BF16)))
    if scheme is SCHEMES["dualscale uos"]:  # which no operator quantizes
        assert recorder.calls == []
        return
    for one, other in zip(wide, cast, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@by_scheme
def test_a_weight_is_not_copied_to_be_transposed(recorder: Recorder, scheme: Scheme) -> None:
    x, w = torch.randn(7, 128, dtype=BF16), torch.randn(9, 128, dtype=BF16)
    kernel = native(scheme)
    parts = get_format(scheme.weight).quantize(w)
    weight = kernel.arrange(parts)
    kernel.gemm(kernel.quantize(x, scheme.activation), weight, None, problem(x, w), scheme)
    arguments = recorder.calls[-1].arguments
    shared = {"x2": parts[0], "scale": parts[1], "x2_level1_scale": parts[1]}
    if "dualscale" in scheme.method:
        del shared["x2"]  # the format cast copies it
    for name in shared.keys() & arguments.keys():
        assert arguments[name].data_ptr() == shared[name].data_ptr(), name


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("int8", {"N": 65536}, "N = 65536, and torch_npu takes at most 65535"),
        ("int8", {"K": 65536}, "K = 65536, and torch_npu takes at most 65535"),
        ("mxfp8", {"N": 65536}, "at most 65535"),
        ("mxfp4", {"N": 70000}, "at most 65535"),
        ("dualscale", {"N": 70000}, "at most 65535"),
        ("mxfp8", {"K": 65520}, "K = 65536, and torch_npu takes at most 65535"),
        ("int8", {"dtype": torch.float32}, "the result is float32"),
        ("int8", {"b_rank": 3}, "not with a batch"),
        ("mxfp8", {"K": "s0", "b_is_weight": False}, "K is symbolic (s0)"),
        ("mxfp4", {"K": 96}, "K = 96 is 3 blocks of 32"),
        ("mxfp4 uos", {"K": 65}, "K = 65 is 3 blocks of 32"),
        ("mxfp4 w4a8", {"K": 65}, "K = 65 is 3 blocks of 32"),
        ("mxfp4 w4a8", {"dtype": FP16}, "to bfloat16, not to float16"),
    ],
)
def test_what_an_operator_cannot_take_goes_to_the_next_kernel(
    name: str, changes: dict[str, Any], said: str
) -> None:
    scheme, place = SCHEMES[name], Target("npu", "ascend950")
    x, w = torch.empty(7, 128, dtype=BF16), torch.empty(9, 128, dtype=BF16)
    kernel, why = registry.choose(scheme, place, problem(x, w))
    assert kernel is not None
    assert (kernel.native, why) == (True, "")
    kernel, why = registry.choose(scheme, place, problem(x, w, **changes))
    assert kernel is None or not kernel.native
    assert said in why
    largest = registry.choose(scheme, place, problem(x, w, N=65535))[0]
    assert largest is not None
    assert largest.native


def test_mx_operators_are_not_offered_before_ascend_950(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("mxfp8", "mxfp4", "mxfp4_dualscale"):
        rows = registry.candidates(method, Target("npu", "ascend910b"))
        assert not any(kernel.native for kernel in rows)
    module, recorder = fake_torch_npu.install("ascend910b")
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    x, w = torch.randn(7, 50, dtype=BF16), torch.randn(9, 50, dtype=BF16)
    kernel, scheme = native(SCHEMES["int8"], "ascend910b"), SCHEMES["int8"]
    parts = get_format("int8").quantize(w)
    kernel.gemm(kernel.quantize(x, "int8"), parts, None, problem(x, w), scheme)
    assert len(recorder.calls) == 2


def test_without_torch_npu_a_call_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(OmniqError, match=r"torch_npu, which is not installed here.*'target'"):
        operators.npu_dynamic_quant(torch.randn(3, 8, dtype=BF16))


def test_a_broken_torch_npu_is_not_taken_for_a_missing_one(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch_npu.py").write_text("import libhccl_of_a_missing_driver")
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="libhccl_of_a_missing_driver"):
        operators.npu_dynamic_quant(torch.randn(3, 8, dtype=BF16))


def operands(scheme: Scheme, dtype: torch.dtype = BF16) -> tuple[Sequence[Any], ...]:
    x, w = torch.randn(2, 7, 128, dtype=dtype), torch.randn(9, 128, dtype=dtype)
    return get_format(scheme.activation).quantize(x), get_format(scheme.weight).quantize(w)


@pytest.mark.parametrize("name", ["int8", "mxfp8", "mxfp4", "mxfp4 w4a8", "dualscale"])
def test_operators_keep_what_torch_library_asks_of_them(recorder: Recorder, name: str) -> None:
    scheme = SCHEMES[name]
    x = torch.randn(2, 7, 75, dtype=BF16)
    quantizers = {
        "int8": (operators.npu_dynamic_quant, (x,)),
        "mxfp8": (operators.npu_dynamic_mx_quant, (x, "mxfp8")),
        "mxfp4": (operators.npu_dynamic_mx_quant, (x, "mxfp4")),
        "dualscale": (operators.npu_dynamic_dual_level_mx_quant, (x,)),
    }
    matmuls = {
        "int8": operators.npu_quant_matmul,
        "dualscale": operators.npu_dual_level_quant_matmul,
    }
    if name in quantizers:
        torch.library.opcheck(*quantizers[name], test_utils=_checks(*quantizers[name][1]))
    a, b = operands(scheme)
    matmul = matmuls.get(name, operators.npu_mx_quant_matmul)
    if name == "dualscale":
        laid_out = operators.npu_dual_level_arrange
        torch.library.opcheck(laid_out, (b[0], b[2]), test_utils=_checks(*b))
    b = native(scheme).arrange(b)
    arguments = (*a, *b, torch.randn(9), BF16)
    if name != "dualscale":
        torch.library.opcheck(matmul, arguments, test_utils=_checks(*a, *b))
        return
    # opcheck copies its inputs, and a copy is not FRACTAL_NZ.
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    real, fake = matmul(*arguments), matmul(*meta)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def _checks(*tensors: Any) -> tuple[str, ...]:
    """The schema check does arithmetic on its inputs, which PyTorch has not for e4m3 on CPU."""
    is_e4m3 = any(getattr(t, "dtype", None) is torch.float8_e4m3fn for t in tensors)
    return ("test_faketensor",) if is_e4m3 else ("test_schema", "test_faketensor")


@pytest.mark.parametrize("dynamic", [False, True])
@by_scheme
def test_a_lowered_graph_traces_without_torch_npu(scheme: Scheme, dynamic: bool) -> None:
    def forward(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, w, b)

    model = Holder(forward, w=torch.randn(384, 320, dtype=BF16), b=torch.randn(384, dtype=BF16))
    options: dict[str, Any] = {"method": scheme.method}
    if scheme.weight.endswith("_uos"):
        options["mxfp4_scale_alg"] = 2
    if scheme.method == "mxfp4_dualscale":
        options["num_bf16_fallback_layers"] = 0
    x = torch.randn(2, 33, 320, dtype=BF16)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    report = omniq.explain(model, [x], options, target="npu:ascend950")
    assert [site.decision.kernel for site in report.sites] == [native(scheme).name]
    assert "omniq.npu_" in report.graphs[0].programs["lowered"]
    assert "torch_npu" not in sys.modules
