"""Every spelling of weight times activation is one site, rewritten, with the right numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS, Holder, compiled, dequantized, error, run, traced
from torch import fx, nn

from omniq_compile import QuantConfig
from omniq_compile.lowering.formats import get_format
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context
from omniq_compile.passes.rewrite import GEMM
from omniq_compile.passes.sites import Kind

Axes = tuple[int, ...]


def quantized(model: nn.Module, x: torch.Tensor, **options: Any) -> fx.GraphModule:
    """Return the graph of a call before it is lowered."""
    config = QuantConfig.from_options(OPTIONS | options)
    context = Context(config, config.target, stages={})
    ((gm, _),) = traced(model, x)
    pipeline.run(gm, context)
    assert context.stages is not None
    return context.stages["quantized"]


@dataclass(frozen=True)
class Case:
    """A spelling, its operands, and the axes that the product sums over."""

    spelling: str
    function: Callable[..., torch.Tensor]
    x: Axes
    x_sums: Axes
    w: Axes
    w_sums: Axes
    MKN: tuple[int, int, int]
    bias: Axes | None = None


# 7 or 5 tokens, K = 38 and N = 19; 3, 2 and 4 in front; heads of 4 x 5 and 2 x 19.
X, W, T, MKN = (7, 38), (19, 38), (38, 19), (7, 38, 19)
THREE, SIX = (21, 38, 19), (42, 38, 19)
LAST, FIRST = (-1,), (-2,)


def case(
    spelling: str,
    function: Callable[..., torch.Tensor],
    x: Axes = X,
    x_sums: Axes = LAST,
    w: Axes = T,
    w_sums: Axes = FIRST,
    sizes: tuple[int, int, int] = MKN,
    bias: Axes | None = None,
) -> Case:
    return Case(spelling, function, x, x_sums, w, w_sums, sizes, bias)


def einsum(equation: str) -> Callable[..., torch.Tensor]:
    return lambda x, w: torch.einsum(equation, x, w)


CASES = {
    "linear": case("linear", F.linear, w=W, w_sums=LAST),
    "linear_bias": case("linear", F.linear, w=W, w_sums=LAST, bias=(19,)),
    "linear_keywords": case(
        "linear", lambda x, w, b: F.linear(bias=b, weight=w, input=x), w=W, w_sums=LAST, bias=(19,)
    ),
    "linear_1d": case(
        "linear", F.linear, (38,), LAST, W, LAST, (1, 38, 19), (19,)
    ),
    "linear_3d": case("linear", F.linear, (3, *X), LAST, W, LAST, THREE, (19,)),
    "linear_4d": case("linear", F.linear, (2, 3, *X), LAST, W, LAST, SIX, (19,)),
    "at": case("@", lambda x, w: x @ w),
    "at_transposed": case("@", lambda x, w: x @ w.T, w=W, w_sums=LAST),
    "at_1d": case("@", lambda x, w: x @ w, (38,), sizes=(1, 38, 19)),
    "at_3d": case("@", lambda x, w: x @ w, (3, *X), sizes=THREE),
    "at_4d": case("@", lambda x, w: x @ w, (2, 3, *X), sizes=SIX),
    "at_in_place": case("@", lambda x, w: _imatmul(x, w)),
    "rmatmul": case("@", lambda x, w: w.__rmatmul__(x)),
    "at_left": case("@", lambda x, w: w @ x, (38, 7), FIRST, W, LAST),
    "at_left_3d": case("@", lambda x, w: w @ x, (3, 38, 7), FIRST, W, LAST, THREE),
    "at_left_batched": case("@", lambda x, w: w @ x, (3, 38, 7), FIRST, (3, *W), LAST),
    "at_weight_batched": case("@", lambda x, w: x @ w, (3, *X), LAST, (3, *T)),
    "at_weight_batched_broadcast": case("@", lambda x, w: x @ w, X, LAST, (3, *T)),
    "at_weight_batched_twice": case("@", lambda x, w: x @ w, (2, 1, *X), LAST, (3, *T)),
    "matmul": case("matmul", torch.matmul),
    "matmul_method": case("matmul", lambda x, w: x.matmul(w)),
    "matmul_keyword": case("matmul", lambda x, w: torch.matmul(input=x, other=w)),
    "matmul_linalg": case("matmul", torch.linalg.matmul),
    "mm": case("mm", torch.mm),
    "mm_method": case("mm", lambda x, w: x.mm(w)),
    "mm_keyword": case("mm", lambda x, w: torch.mm(x, mat2=w)),
    "mm_left": case("mm", lambda x, w: torch.mm(w, x), (38, 7), FIRST, W, LAST),
    "bmm": case("bmm", torch.bmm, (3, *X), LAST, (3, *T)),
    "bmm_method": case("bmm", lambda x, w: x.bmm(w), (3, *X), LAST, (3, *T)),
    "bmm_left": case("bmm", lambda x, w: w.bmm(x), (3, 38, 7), FIRST, (3, *W), LAST),
    "inner": case("inner", torch.inner, w=W, w_sums=LAST),
    "inner_3d": case("inner", lambda x, w: x.inner(w), (3, *X), LAST, W, LAST, THREE),
    "inner_left": case("inner", lambda x, w: torch.inner(w, x), w=W, w_sums=LAST),
    "inner_left_3d": case("inner", lambda x, w: torch.inner(w, x), w=(3, *W), w_sums=LAST),
    "addmm": case("addmm", lambda x, w, b: torch.addmm(b, x, w), bias=(19,)),
    "addmm_method": case("addmm", lambda x, w, b: b.addmm(x, w), bias=(7, 19)),
    "addmm_scaled": case(
        "addmm", lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=1.75), bias=(19,)
    ),
    "addmm_keywords": case(
        "addmm", lambda x, w, b: torch.addmm(input=b, mat1=x, mat2=w, alpha=-2), bias=(19,)
    ),
    "addmm_column": case("addmm", lambda x, w, b: torch.addmm(b, x, w), bias=(7, 1)),
    "addmm_scalar": case("addmm", lambda x, w, b: torch.addmm(b, x, w), bias=()),
    "addmm_one": case("addmm", lambda x, w, b: torch.addmm(b, x, w), bias=(1,)),
    "addmm_left": case(
        "addmm", lambda x, w, b: torch.addmm(b, w, x), (38, 7), FIRST, W, LAST, bias=(7,)
    ),
    "addmm_left_square": case(
        "addmm", lambda x, w, b: torch.addmm(b, w, x),
        (38, 19), FIRST, W, LAST, (19, 38, 19), bias=(19,),
    ),
    "baddbmm": case(
        "baddbmm", lambda x, w, b: torch.baddbmm(b, x, w), (3, *X), LAST, (3, *T), bias=(3, 7, 19)
    ),
    "baddbmm_scaled": case(
        "baddbmm",
        lambda x, w, b: torch.baddbmm(b, batch1=x, batch2=w, beta=3, alpha=0.25),
        (3, *X), LAST, (3, *T), bias=(7, 1),
    ),
    "baddbmm_row": case(
        "baddbmm", lambda x, w, b: b.baddbmm(x, w), (3, *X), LAST, (3, *T), bias=(1, 1, 19)
    ),
    "einsum": case("einsum", einsum("mk,kn->mn")),
    "einsum_list": case("einsum", lambda x, w: torch.einsum("mk,kn->mn", [x, w])),
    "einsum_numbers": case("einsum", lambda x, w: torch.einsum(x, [0, 51], w, [51, 2], [0, 2])),
    "einsum_numbers_ellipsis": case(
        "einsum", lambda x, w: torch.einsum(x, [..., 1], w, [1, 9], [..., 9]), (3, *X), sizes=THREE
    ),
    "einsum_swapped": case("einsum", lambda x, w: torch.einsum("kn, mk -> mn", w, x)),
    "einsum_output_transposed": case("einsum", einsum("mk,kn->nm")),
    "einsum_weight_transposed": case("einsum", einsum("mk,nk->mn"), w=W, w_sums=LAST),
    "einsum_activation_transposed": case("einsum", einsum("Km,Kn->mn"), (38, 7), FIRST),
    "einsum_batched_rows": case("einsum", einsum("bsk,kn->bsn"), (3, *X), sizes=THREE),
    "einsum_rows_mixed": case("einsum", einsum("bsk,kn->nsb"), (3, *X), sizes=THREE),
    "einsum_ellipsis": case("einsum", einsum("...k,kn->...n"), (2, 3, *X), sizes=SIX),
    "einsum_ellipsis_empty": case("einsum", einsum("m...k,kn->mn..."), X),
    "einsum_ellipsis_weight": case(
        "einsum", einsum("mk,...k->m..."), X, LAST, (2, 19, 38), LAST, (7, 38, 38)
    ),
    "einsum_implied": case("einsum", einsum("mk,kn")),
    "einsum_implied_capital_first": case("einsum", einsum("mk,kN")),
    "einsum_implied_numbers": case("einsum", lambda x, w: torch.einsum(x, [0, 51], w, [51, 2])),
    "einsum_implied_numbers_sorted": case(
        "einsum", lambda x, w: torch.einsum(x, [30, 51], w, [51, 2])
    ),
    "einsum_implied_ellipsis": case("einsum", einsum("...k,nk"), (2, 3, *X), LAST, W, LAST, SIX),
    "einsum_two_ellipses": case(
        "einsum", einsum("...mk,...kn->...mn"), (3, *X), LAST, (3, *T)
    ),
    "einsum_two_ellipses_implied": case(
        "einsum", einsum("m...k,k...n"), (7, 3, 38), LAST, (38, 3, 19), (0,)
    ),
    "einsum_two_ellipses_one_shorter": case(
        "einsum", einsum("...k,...kn->...n"), (2, 3, 38), LAST, (3, *T), sizes=(2, 38, 19)
    ),
    "einsum_two_ellipses_one_empty": case(
        "einsum", einsum("...mk,...nk->n...m"), (3, *X), LAST, W, LAST, THREE
    ),
    "einsum_batched_weight": case("einsum", einsum("gmk,gkn->gmn"), (3, *X), LAST, (3, *T)),
    "einsum_batched_weight_moved": case(
        "einsum", einsum("mgk,gkn->nmg"), (7, 3, 38), LAST, (3, *T)
    ),
    "einsum_merges_heads": case(
        "einsum", einsum("bshd,hdm->bsm"), (3, 7, 2, 19), (2, 3), (2, 19, 23), (0, 1), (21, 38, 23)
    ),
    "einsum_merges_heads_mixed": case(
        "einsum", einsum("bdsh,mhd->bms"), (3, 19, 7, 2), (1, 3), (23, 2, 19), (1, 2), (21, 38, 23)
    ),
    "einsum_splits_heads": case(
        "einsum", einsum("bsk,khd->bhsd"), (3, *X), LAST, (38, 4, 5), (0,), (21, 38, 20)
    ),
    "einsum_splits_heads_mixed": case(
        "einsum", einsum("sk,dkh->hsd"), X, LAST, (5, 38, 4), (1,), (7, 38, 20)
    ),
    "tensordot": case("tensordot", lambda x, w: torch.tensordot(x, w, 1), (3, *X), sizes=THREE),
    "tensordot_axes": case(
        "tensordot",
        lambda x, w: torch.tensordot(x, w, ([1], [-1])),
        (3, 38, 7), FIRST, W, LAST, THREE,
    ),
    "tensordot_left": case(
        "tensordot",
        lambda x, w: torch.tensordot(w, x, dims=([1], [2])),
        (3, *X), LAST, W, LAST, THREE,
    ),
    "tensordot_two_axes": case(
        "tensordot", torch.tensordot, (3, 7, 2, 19), (2, 3), (2, 19, 23), (0, 1), (21, 38, 23)
    ),
    "operator": case("linear", torch.ops.aten.linear, w=W, w_sums=LAST),
    "operator_keywords": case("mm", lambda x, w: torch.ops.aten.mm(self=x, mat2=w)),
    "operator_added_keywords": case(
        "addmm", lambda x, w, b: torch.ops.aten.addmm.default(self=b, mat1=x, mat2=w), bias=(19,)
    ),
    "operator_einsum_keyword": case(
        "einsum", lambda x, w: torch.ops.aten.einsum("mk,kn->mn", tensors=[x, w])
    ),
}  # fmt: skip


def _imatmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    x @= w
    return x


def _operands(row: Case, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tensors = {"w": torch.randn(row.w, dtype=dtype)}
    if row.bias is not None:
        tensors["b"] = torch.randn(row.bias, dtype=dtype)
    return torch.randn(row.x, dtype=dtype), tensors


@pytest.mark.parametrize("row", CASES.values(), ids=CASES)
def test_a_spelling_is_one_site_that_multiplies_the_dequantized_operands(row: Case) -> None:
    x, tensors = _operands(row, torch.float32)
    model = Holder(row.function, **tensors)

    result, (site,) = run(model, x)
    assert (site.spelling, site.kind) == (row.spelling, Kind.WEIGHT)
    assert site.problem is not None
    assert (site.problem.M, site.problem.K, site.problem.N) == row.MKN
    assert site.decision.method == "int8"

    weight, *bias = tensors.values()
    exact = row.function(
        dequantized(x, *row.x_sums), dequantized(weight, *row.w_sums), *(b.double() for b in bias)
    )
    assert result.shape == exact.shape
    assert error(result, exact) < 5e-7
    eager = model(x)
    assert 1e-4 < error(result, eager) < 0.03
    assert result.stride() == eager.stride()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "name", ["at_left_3d", "at_left_batched", "mm_left", "inner_left", "addmm_left"]
)
def test_a_result_may_be_viewed_as_the_product_may(name: str, dynamic: bool) -> None:
    row = CASES[name]
    x, tensors = _operands(row, torch.float32)
    model = Holder(lambda *operands: row.function(*operands).view(-1), **tensors)
    call = torch.compile(model, backend="omniq", options=OPTIONS, dynamic=dynamic)
    weight, *bias = tensors.values()
    exact = row.function(
        dequantized(x, *row.x_sums), dequantized(weight, *row.w_sums), *(b.double() for b in bias)
    )
    assert error(call(x), exact.reshape(-1)) < 5e-7


BF16 = ("linear_bias", "at_left_3d", "matmul", "mm", "bmm", "inner", "addmm_scaled", "baddbmm_row")


@pytest.mark.parametrize("name", [*BF16, "einsum_merges_heads"])
def test_a_spelling_in_bf16_is_near_eager(name: str) -> None:
    row = CASES[name]
    x, tensors = _operands(row, torch.bfloat16)
    model = Holder(row.function, **tensors)
    result, eager = compiled(model)(x), model(x)
    assert result.dtype is torch.bfloat16
    assert result.shape == eager.shape
    assert error(result, eager) < 0.03


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_module_is_one_site_named_after_it(bias: bool) -> None:
    model = nn.Sequential(nn.GELU(), nn.Linear(38, 19, bias=bias)).requires_grad_(False)
    x = torch.randn(3, 7, 38)
    result, (site,) = run(model, x)
    assert (site.layer, site.weight_name, site.decision.method) == ("1", "1.weight", "int8")
    b = model[1].bias.double() if bias else 0
    exact = dequantized(F.gelu(x)) @ dequantized(model[1].weight).T + b
    assert error(result, exact) < 5e-7


@pytest.mark.parametrize("target", ["cpu:generic", "cpu:avx512_bf16"])
@pytest.mark.parametrize("method", ["int8", "fp8", "mxfp4"])
@pytest.mark.parametrize("spelling", ["addmm", "linear"])
@pytest.mark.parametrize(("N", "size"), [(19, 1), (19, 19), (1, 1)])
def test_a_kernel_adds_a_bias_of_n_elements_and_no_other(
    N: int, size: int, spelling: str, method: str, target: str
) -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.addmm(b, x, w.T) if spelling == "addmm" else F.linear(x, w, b)

    x, w, b = torch.randn(7, 38), torch.randn(N, 38), torch.randn(size)
    options = {"method": method, "target": target}
    model = Holder(function, w=w, b=b)
    result, (site,) = run(model, x, **options)
    # omniq.gemm (a, b, bias, ...) and, where it has no bias, torch.add.
    assert site.decision.method == method
    biases = [n.args[2] for n in quantized(model, x, **options).graph.nodes if n.target is GEMM]
    assert [bias is not None for bias in biases] == [size == N]

    form = get_format(method)
    real, weight = (form.dequantize(form.quantize(t))[:, :38].double() for t in (x, w))
    exact = real @ weight.T + b.double()
    assert result.shape == (7, N)
    assert error(result, exact) < 5e-7


@pytest.mark.parametrize("cut", [lambda b: b[::2], lambda b: b[:1].expand(19)])
def test_a_kernel_adds_no_bias_whose_elements_lie_apart(cut: Any) -> None:
    x, w, b = torch.randn(7, 38), torch.randn(19, 38), torch.randn(37)
    model = Holder(lambda x, w, b: F.linear(x, w, cut(b)), w=w, b=b)
    graph = quantized(model, x, target="cuda:sm_90").graph
    (bias,) = [n.args[2] for n in graph.nodes if n.target is GEMM]
    assert bias is None
    assert error(run(model, x)[0], dequantized(x) @ dequantized(w).T + cut(b).double()) < 5e-7


def test_the_size_of_a_bias_may_be_symbolic() -> None:
    model = Holder(lambda x, y, b: torch.addmm(b, x, y))
    call = torch.compile(model, backend="omniq", options=OPTIONS | {"matmul": True}, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for N in (19, 23, 40):
            x, y, b = torch.randn(7, 38), torch.randn(38, N), torch.randn(N)
            exact = dequantized(x) @ dequantized(y, -2) + b.double()
            assert error(call(x, y, b), exact) < 5e-7


@pytest.mark.parametrize("spelling", ["addmm", "baddbmm"])
def test_beta_zero_ignores_a_nan_input(spelling: str) -> None:
    front = (3,) if spelling == "baddbmm" else ()
    function = getattr(torch, spelling)
    w = torch.randn(*front, 38, 19)
    model = Holder(lambda x, w: function(x.new_full((19,), torch.nan), x, w, beta=0), w=w)
    x = torch.randn(*front, 7, 38)
    result, (site,) = run(model, x)
    assert site.decision.method == "int8"
    assert error(result, dequantized(x) @ dequantized(w, -2)) < 5e-7


def test_alpha_may_change_between_calls() -> None:
    w = torch.randn(38, 19)
    model = Holder(lambda x, alpha, w: torch.addmm(x[:, :1], x, w, alpha=alpha), w=w)
    call = torch.compile(model, backend="omniq", options=OPTIONS, dynamic=True)
    x = torch.randn(7, 38)
    for alpha in (3, 5, 11):
        exact = x[:, :1] + alpha * (dequantized(x) @ dequantized(w, -2))
        assert error(call(x, alpha), exact) < 5e-7


def test_the_number_of_tokens_may_change_without_a_new_compile() -> None:
    w = torch.randn(19, 38)
    call = torch.compile(Holder(F.linear, w=w), backend="omniq", options=OPTIONS, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 11, 30):
            x = torch.randn(2, tokens, 38)
            assert error(call(x), dequantized(x) @ dequantized(w).T) < 5e-7


def test_both_kernels_of_cpu_give_the_same_numbers() -> None:
    w = torch.randn(3, 38, 19)
    x = torch.randn(3, 7, 38)
    exact = dequantized(x) @ dequantized(w, -2)
    for target in ("cpu:generic", "cpu:avx512_vnni"):
        assert error(compiled(Holder(torch.bmm, w=w), target=target)(x), exact) < 5e-7


def test_products_under_vmap_are_kept_and_others_are_not() -> None:
    """vmap hides an axis of what they multiply, and of a stack of weights."""
    w, stack = torch.randn(19, 38), torch.randn(3, 19, 38)

    def function(x: torch.Tensor, w: torch.Tensor, stack: torch.Tensor) -> Any:
        each = torch.vmap(lambda row: F.linear(row, w))
        return each(x), torch.vmap(each)(x), torch.vmap(F.linear)(x, stack), F.linear(x, w)

    model, x = Holder(function, w=w, stack=stack), torch.randn(3, 7, 38)
    result, found = run(model, x)
    assert [site.decision.method for site in found] == [None, None, None, "int8"]
    assert all("torch.func, such as vmap" in site.decision.reason for site in found[:3])
    for actual, expected in zip(result[:3], model(x)[:3], strict=True):
        assert torch.equal(actual, expected)
    assert error(result[3], dequantized(x) @ dequantized(w).T) < 5e-7
