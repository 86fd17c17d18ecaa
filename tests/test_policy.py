"""What is kept, with which reason and bitwise as it was; and what options move the line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Holder, compiled, dequantized, error, run, sites
from torch import nn

from omniq_compile import explain, quantize_
from omniq_compile.passes import dynamo
from omniq_compile.passes.sites import Kind

ACTIVATIONS = "two activations (option 'matmul': True quantizes both operands)"
INPUT = ACTIVATIONS.replace("two activations", "its weight is an input, no parameter or buffer")
VECTOR = "one operand is a vector, not a matrix"
PARAMETERS = "both operands are parameters"
CELL = "PyTorch computes its products in one call"
GROUPS = "it multiplies groups of rows by a matrix each, in one call"


def no_product(equation: str) -> str:
    return f"einsum {equation!r} is not one matrix product"


def einsum(equation: str, x: tuple[int, ...], w: tuple[int, ...]) -> Any:
    return lambda a, b: torch.einsum(equation, a, b), x, w, no_product(equation)


# name: the function of an activation and a weight, their shapes, why it is kept
NEAR_MISSES: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...], str]] = {
    "vector_times_vector": (lambda x, w: x @ w, (38,), (38,), VECTOR),
    "matrix_times_vector": (lambda x, w: x @ w, (7, 38), (38,), VECTOR),
    "weight_times_vector": (lambda x, w: w @ x, (38,), (19, 38), VECTOR),
    "vector_times_batch": (lambda x, w: x @ w, (38,), (3, 38, 19), VECTOR),
    "linear_of_a_vector": (F.linear, (7, 38), (38,), VECTOR),
    "inner_of_batches": (
        torch.inner, (7, 38), (3, 19, 38), "an inner product of these ranks"),
    "weight_times_weight": (lambda x, w: (w @ w.T, x)[0], (7, 38), (19, 38), PARAMETERS),
    "einsum_repeated_letter": einsum("mmk,kn->mn", (7, 7, 38), (38, 19)),
    "einsum_letter_summed_alone": einsum("mpk,kn->mn", (7, 5, 38), (38, 19)),
    "einsum_weight_letter_summed_alone": einsum("mk,kpn->mn", (7, 38), (38, 5, 19)),
    "einsum_outer": einsum("mk,n->mkn", (7, 38), (19,)),
    "einsum_elementwise": einsum("mk,mk->mk", (7, 38), (7, 38)),
    "einsum_row_sums": einsum("mk,mk->m", (7, 38), (7, 38)),
    "einsum_vector": einsum("k,kn->n", (38,), (38, 19)),
    "einsum_implied_sum": einsum("mk,mk", (7, 38), (7, 38)),
    "einsum_two_ellipses_of_different_ranks": einsum(
        "...mk,...kn->...mn", (3, 7, 38), (2, 3, 38, 19)),
    "einsum_ellipsis_summed": einsum("...k,kn->n", (7, 38), (38, 19)),
    "einsum_batched_two_rows": einsum("gmpk,gkn->gmpn", (3, 7, 5, 38), (3, 38, 19)),
    "einsum_broadcast_sum_of_x": einsum("mk,kn->mn", (7, 1), (38, 19)),
    "einsum_three_operands": (
        lambda x, w: torch.einsum("mk,nk,n->m", x, w, w[:, 0]), (7, 38), (19, 38),
        no_product("mk,nk,n->m")),
    "einsum_implied_sum_of_numbers": (
        lambda x, w: torch.einsum(x, [0, 1], w, [0, 1]), (7, 38), (7, 38), no_product("AB,AB")),
    "gru_cell": (lambda x, w: torch.gru_cell(x, x, w, w), (7, 19), (57, 19), CELL),
    "lstm_cell": (lambda x, w: torch.lstm_cell(x, (x, x), w, w)[0], (7, 19), (76, 19), CELL),
    "rnn_cell": (lambda x, w: torch.rnn_relu_cell(x, x, w, w), (7, 19), (19, 19), CELL),
    "einsum_broadcast_sum_of_w": einsum("mk,kn->mn", (7, 38), (1, 19)),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_one_site_kept_bitwise(name: str) -> None:
    function, x_shape, w_shape, reason = NEAR_MISSES[name]
    model, x = Holder(function, w=torch.randn(w_shape)), torch.randn(x_shape)
    result, (site,) = run(model, x, matmul=True)
    assert (site.decision.method, site.decision.reason) == (None, reason)
    assert torch.equal(result, model(x))


@pytest.mark.parametrize("function", [F.grouped_mm, torch._grouped_mm])
def test_the_experts_of_a_mixture_are_one_site_kept_bitwise(function: Callable[..., Any]) -> None:
    w, ends = torch.randn(3, 64, 48).bfloat16(), torch.tensor([16, 40, 57], dtype=torch.int32)
    model, x = Holder(lambda x, w: function(x, w, offs=ends), w=w), torch.randn(57, 64).bfloat16()
    result, (site,) = run(model, x)
    assert (site.decision.method, site.decision.reason) == (None, GROUPS)
    assert torch.equal(result, model(x))


def test_a_tensor_made_of_others_is_not_quantized() -> None:
    rows = [torch.randn(3, 38), torch.randn(5, 38)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    model = Holder(F.linear, w=torch.randn(19, 38))
    result, (site,) = run(model, x)
    assert (site.decision.method, site.decision.reason) == (None, "it multiplies a NestedTensor")
    assert torch.equal(result.values(), model(x).values())


# name: a product of an activation [7, 38] and another operand [38, 19] that takes out=
INTO: dict[str, Callable[..., torch.Tensor]] = {
    "matmul": torch.matmul,
    "mm": torch.mm,
    "linalg": torch.linalg.matmul,
    "inner": lambda x, y, out: torch.inner(x, y.T.contiguous(), out=out),
    "addmm": lambda x, y, out: torch.addmm(x[:, :1], x, y, out=out),
    "position": lambda x, y, out: torch.tensordot(x, y, 1, out),
}


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("name", INTO)
def test_a_product_into_out_is_kept_and_writes_there(name: str, weight: bool) -> None:
    def function(x: torch.Tensor, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        INTO[name](x, y, out=out)
        return out * 2

    x, y = torch.randn(7, 38), torch.randn(38, 19)
    model = Holder(function, y=y) if weight else Holder(lambda x, y, out: function(x, out, y))
    inputs = (x,) if weight else (x, y)
    out, expected = torch.zeros(7, 19), torch.zeros(7, 19)
    result, (site,) = run(model, *inputs, out, matmul=True)
    assert site.kind is (Kind.WEIGHT if weight else Kind.ACTIVATION)
    assert (site.decision.method, site.decision.reason) == (None, "it writes into out=")
    assert torch.equal(result, model(*inputs, expected))
    assert torch.equal(out, expected)
    assert out.any()


def test_out_that_is_none_is_no_out() -> None:
    x, y = torch.randn(7, 38), torch.randn(38, 19)
    result, (site,) = run(Holder(lambda x, y: torch.matmul(x, y, out=None)), x, y, matmul=True)
    assert site.decision.method == "int8"
    assert error(result, dequantized(x) @ dequantized(y, -2)) < 5e-7


# name: the function of an activation and a weight; no site at all
NO_SITE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "elementwise": lambda x, w: x * w[:7],
    "one_operand": lambda x, w: torch.einsum("mk->km", x) + w[0, 0],
    "dot": lambda x, w: torch.dot(x[0], w[0]),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None], x[None], x[None]) + w[0],
    "convolution": lambda x, w: F.conv1d(x[None], w[None, :7]),
    "embedding": lambda x, w: F.embedding(x.argmax(1) % 19, w),
}


@pytest.mark.parametrize("name", NO_SITE)
def test_a_graph_without_a_site_runs_as_it_is(name: str) -> None:
    model, x = Holder(NO_SITE[name], w=torch.randn(19, 38)), torch.randn(7, 38)
    result, sites = run(model, x, matmul=True)
    assert sites == []
    assert torch.equal(result, model(x))


# name: spelling, function of two activations, their shapes, axes summed over, reason when kept
PRODUCTS: dict[str, tuple[str, Callable[..., Any], Any, Any, int, int, str]] = {
    "at": ("@", lambda x, y: x @ y, (7, 38), (38, 19), -1, -2, ACTIVATIONS),
    "at_1d": ("@", lambda x, y: x @ y, (38,), (38, 19), -1, -2, ACTIVATIONS),
    "matmul_batched": ("matmul", torch.matmul, (3, 7, 38), (3, 38, 19), -1, -2, ACTIVATIONS),
    "matmul_left": ("matmul", torch.matmul, (7, 38), (3, 38, 19), -1, -2, ACTIVATIONS),
    "matmul_right": ("matmul", torch.matmul, (2, 3, 7, 38), (38, 19), -1, -2, ACTIVATIONS),
    "matmul_broadcast": (
        "matmul", torch.matmul, (2, 1, 7, 38), (3, 38, 19), -1, -2, ACTIVATIONS),
    "attention": (
        "@", lambda q, k: q @ k.transpose(-1, -2), (2, 3, 7, 38), (2, 3, 19, 38), -1, -1,
        ACTIVATIONS),
    "mm": ("mm", torch.mm, (7, 38), (38, 19), -1, -2, ACTIVATIONS),
    "bmm": ("bmm", torch.bmm, (3, 7, 38), (3, 38, 19), -1, -2, ACTIVATIONS),
    "baddbmm": (
        "baddbmm", lambda x, y: torch.baddbmm(x.new_ones(19), x, y, alpha=2),
        (3, 7, 38), (3, 38, 19), -1, -2, ACTIVATIONS),
    "inner": ("inner", torch.inner, (7, 38), (19, 38), -1, -1, ACTIVATIONS),
    "linear": ("linear", F.linear, (3, 7, 38), (19, 38), -1, -1, INPUT),
    "einsum_heads": (
        "einsum", lambda q, k: torch.einsum("bqhd,bkhd->bhqk", q, k), (2, 7, 3, 38),
        (2, 19, 3, 38), -1, -1, ACTIVATIONS),
}  # fmt: skip


@pytest.mark.parametrize("matmul", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_two_activations_are_quantized_per_row_only_on_request(name: str, matmul: bool) -> None:
    spelling, function, x_shape, y_shape, x_axis, y_axis, reason = PRODUCTS[name]
    x, y = torch.randn(x_shape), torch.randn(y_shape)
    model = Holder(function)
    result, (site,) = run(model, x, y, matmul=matmul)
    assert (site.spelling, site.kind) == (spelling, Kind.ACTIVATION)
    if not matmul:
        assert (site.decision.method, site.decision.reason) == (None, reason)
        assert torch.equal(result, function(x, y))
        return
    assert site.decision.method == "int8"
    exact = function(dequantized(x, x_axis), dequantized(y, y_axis))
    assert result.shape == exact.shape
    assert error(result, exact) < 5e-7
    assert error(result, function(x, y)) < 0.03


def test_products_of_activations_in_a_deep_model_are_all_quantized() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(260):  # more nodes in a chain than Python recurses
            y = torch.relu(x @ y) * 0.5 + y
        return y

    _, sites = run(Holder(function), torch.randn(19, 19), torch.randn(19, 7), matmul=True)
    assert len(sites) == 260
    assert {(site.kind, site.decision.method) for site in sites} == {(Kind.ACTIVATION, "int8")}


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.float64, "dtype float64 is not quantized"),
        (torch.int64, "dtype int64 is not quantized"),
        (torch.complex64, "dtype complex64 is not quantized"),
    ],
)
def test_other_dtypes_are_kept_bitwise(dtype: torch.dtype, reason: str) -> None:
    w, x = (torch.randn(s).mul(9).to(dtype) for s in ((38, 19), (7, 38)))
    model = Holder(torch.matmul, w=w)
    result, (site,) = run(model, x)
    assert (site.decision.method, site.decision.reason) == (None, reason)
    assert torch.equal(result, x @ w)


MIXED = [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
]
REFUSED = "expected.*dtype|must have the same dtype|have different dtype"


@pytest.mark.parametrize(("x_dtype", "dtype"), MIXED)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_what_torch_refuses_to_multiply_is_refused(
    x_dtype: torch.dtype, dtype: torch.dtype, bias: bool, stored: bool
) -> None:
    layer = nn.Linear(64, 96, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(7, 64).to(x_dtype)
    if stored:
        quantize_(layer, {"method": "int8", "min_features": 1})
    with pytest.raises(RuntimeError, match=REFUSED):
        layer(x)
    with pytest.raises(RuntimeError, match=REFUSED):
        compiled(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < error(compiled(layer)(x), layer(x)) < 0.02


@pytest.mark.parametrize(("x_dtype", "dtype"), MIXED)
def test_autocast_is_known_where_it_begins_and_ends_in_the_graph(
    x_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    w, x = torch.randn(64, 96).to(dtype), torch.randn(7, 64).to(x_dtype)

    def function(x: torch.Tensor, w: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                same = x.to(w.dtype) @ w
            return x @ w, same

    with torch.no_grad():
        both = Holder(function, w=w)
        assert [site.decision.method for site in sites(both, x)][1:] == ["int8"]
        (cast, same), (expected, exact) = compiled(both)(x), both(x)
        assert (cast.dtype, same.dtype) == (expected.dtype, exact.dtype)
        assert 0 < error(cast, expected) < 0.02
        assert error(same, exact) < 0.02

    def inner(x: torch.Tensor, w: torch.Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return x @ w

    def after(x: torch.Tensor, w: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            x = x + 1
        return x @ w

    def of_another_device(x: torch.Tensor, w: torch.Tensor) -> Any:
        with torch.autocast("xpu", torch.bfloat16):
            return x @ w

    for refused, outside in ((inner, True), (after, False), (of_another_device, False)):
        model = Holder(refused, w=w)
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            with pytest.raises(RuntimeError, match=REFUSED):
                model(x)
            with pytest.raises(RuntimeError, match=REFUSED):
                compiled(model)(x)


def test_autocast_casts_a_bias_that_is_scaled() -> None:
    model = Holder(
        lambda x, w, b: torch.addmm(b, x, w, beta=0.5), w=torch.randn(64, 96), b=torch.randn(96)
    )
    x = torch.randn(7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = compiled(model)(x), model(x)
    assert result.dtype is expected.dtype is torch.bfloat16
    assert 0 < error(result, expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_of_one_float_dtype_is_quantized(dtype: torch.dtype) -> None:
    w, x = torch.randn(19, 38, dtype=dtype), torch.randn(7, 38, dtype=dtype)
    model = Holder(F.linear, w=w)
    result, (site,) = run(model, x)
    assert site.decision.method == "int8"
    assert result.dtype is dtype
    exact = dequantized(x) @ dequantized(w).T
    assert error(result, exact) < {torch.float32: 5e-7}.get(dtype, torch.finfo(dtype).eps / 2)


def test_activations_of_lower_precision_keep_no_float32_layer() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, w).bfloat16()
        return y @ y.mT

    layer, scores = sites(Holder(function, w=torch.randn(19, 38)), torch.randn(7, 38))
    assert (layer.decision.method, scores.decision.method) == ("int8", None)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_float32_layer_beside_others_is_kept(low: torch.dtype) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.body = nn.Linear(38, 19), nn.Linear(38, 19).to(low)

        def forward(self, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.time(t), self.body(x)

    model = Model().requires_grad_(False)
    t, x = torch.randn(7, 38), torch.randn(7, 38).to(low)
    result, (time, body) = run(model, t, x)
    assert time.decision.reason == "kept in float32 by the model, beside layers of lower precision"
    assert (time.decision.method, body.decision.method) == (None, "int8")
    exact, near = model(t, x)
    assert torch.equal(result[0], exact)
    assert error(result[1], near) < 0.03


@pytest.mark.parametrize(
    ("K", "N", "least", "reason"),
    [
        (32, 48, 32, None),
        (48, 32, 32, None),
        (31, 48, 32, "K = 31 is under min_features = 32"),
        (48, 31, 32, "N = 31 is under min_features = 32"),
        (2, 1, 1, None),
        (1, 48, 1, "K = 1: an outer product, which sums nothing"),
        (0, 9, 1, "K = 0: empty"),
        (9, 0, 1, "N = 0: empty"),
    ],
)
def test_min_features_is_the_smallest_size_quantized(
    K: int, N: int, least: int, reason: str | None
) -> None:
    model, x = Holder(F.linear, w=torch.randn(N, K)), torch.randn(7, K)
    result, (site,) = run(model, x, min_features=least)
    assert site.decision.method == (None if reason else "int8")
    assert reason is None or site.decision.reason == reason
    if reason:
        assert torch.equal(result, model(x))
    else:
        assert error(result, dequantized(x) @ dequantized(model.w).T) < 5e-7


@pytest.mark.parametrize(("K", "N", "count"), [(256, 257, 1), (255, 257, 0), (257, 255, 0)])
def test_min_features_is_256_unless_told(K: int, N: int, count: int) -> None:
    model = Holder(F.linear, w=torch.randn(N, K))
    report = explain(model, (torch.randn(3, K),), {"method": "int8"})
    assert (len(report.rewritten), len(report.kept)) == (count, 1 - count)


def test_the_number_of_tokens_has_no_minimum() -> None:
    model = Holder(F.linear, w=torch.randn(19, 38))
    for tokens in (0, 1):
        x = torch.randn(tokens, 38)
        result, (site,) = run(model, x, min_features=19)
        assert site.decision.method == "int8"
        assert result.shape == (tokens, 19)
        assert torch.allclose(result.double(), dequantized(x, 1) @ dequantized(model.w).T)


@pytest.mark.parametrize("outside", [None, AttributeError("current_tx")])
def test_outside_a_compile_nothing_is_resumed(
    monkeypatch: pytest.MonkeyPatch, outside: AttributeError | None
) -> None:
    """PyTorch 2.12 says so with None, 2.11 and 2.13 raise."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    def current_tx() -> None:
        if outside is not None:
            raise outside

    monkeypatch.setattr(InstructionTranslator, "current_tx", staticmethod(current_tx))
    assert dynamo.is_resumed() is False
