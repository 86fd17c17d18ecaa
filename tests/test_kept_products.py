"""Products that have no normal form: each is listed, with its reason, and computed as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Holder, dequantized, error, run
from torch import nn

from omniq_compile import explain
from omniq_compile.passes.sites import Kind


def test_products_of_other_than_two_matrices_are_kept_and_named() -> None:
    w, stack, row = torch.randn(38, 38), torch.randn(3, 38, 38), torch.randn(38)

    def function(x: torch.Tensor, w: torch.Tensor, stack: torch.Tensor, row: torch.Tensor) -> Any:
        return (
            torch.mv(w, x[0, 0]),
            torch.addmv(row, w, x[0, 0]),
            torch.addbmm(row, x, stack),
            F.bilinear(x, x.exp(), stack),
            torch.linalg.multi_dot([x[0], w, w]),
            torch.tensordot(x, x, 3),
            x[0, 0] @ stack,
            stack @ x[0, 0],
        )

    model, x = Holder(function, w=w, stack=stack, row=row), torch.randn(3, 7, 38)
    result, found = run(model, x)
    assert [(site.spelling, site.weight_name, site.decision.method) for site in found] == [
        (name, "", None)
        for name in ("mv", "addmv", "addbmm", "bilinear", "multi_dot", "tensordot", "@", "@")
    ]
    weight, activation = Kind.WEIGHT, Kind.ACTIVATION
    assert [site.kind for site in found] == [weight] * 5 + [activation, weight, activation]
    for actual, expected in zip(result, model(x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("equation", ["mmk,kn->mn", "mkk,kn->mn", "mkn,kjj->mj", "mkk,nkk->mn"])
def test_products_of_a_diagonal_are_kept(equation: str) -> None:
    terms = equation.partition("->")[0].split(",")
    x, w = (torch.randn([38] * len(term)) for term in terms)
    model = Holder(lambda x, w: torch.einsum(equation, x, w), w=w)
    result, (site,) = run(model, x)
    assert site.decision.method is None
    assert site.decision.reason == f"einsum {equation!r} is not one matrix product"
    assert torch.equal(result, model(x))


def test_products_that_are_added_into_a_tensor_are_kept_and_named() -> None:
    w, stack = torch.randn(38, 38), torch.randn(3, 38, 38)

    def function(x: torch.Tensor, w: torch.Tensor, stack: torch.Tensor) -> Any:
        y, z = torch.zeros_like(x), torch.ones(38, 38)
        y.baddbmm_(x, stack, beta=2)
        return y, z.addmm_(x[0].T @ x[1], w)

    model, x = Holder(function, w=w, stack=stack), torch.randn(3, 7, 38)
    result, found = run(model, x)
    assert [(s.spelling, s.kind, s.decision.reason) for s in found] == [
        ("baddbmm_", Kind.WEIGHT, "it writes into its input"),
        ("@", Kind.ACTIVATION, "two activations (option 'matmul': True quantizes both operands)"),
        ("addmm_", Kind.WEIGHT, "it writes into its input"),
    ]
    for actual, expected in zip(result, model(x), strict=True):
        assert torch.equal(actual, expected)


INTO: dict[str, Any] = {
    "another": lambda x, w, b: (lambda y: (torch.mm(x, w, out=y), y * 2)[1])(torch.empty(7, 19)),
    "its result": lambda x, w, b: torch.mm(x, w, out=torch.empty(7, 19)) * 2,
    "a buffer": lambda x, w, b: (torch.addmm(b, x, w, out=b), b * 2)[1],
    "a view": lambda x, w, b: (torch.matmul(x, w, out=b[2:]), b * 2)[1],
}


@pytest.mark.parametrize("name", INTO)
def test_products_that_are_written_into_a_tensor_are_kept(name: str) -> None:
    x, w = torch.randn(7, 38), torch.randn(38, 19)
    b = torch.randn(9 if name == "a view" else 7, 19)
    model, eager = (Holder(INTO[name], buffers=True, w=w, b=b.clone()) for _ in range(2))
    result, (site,) = run(model, x)
    assert (site.decision.method, site.decision.reason) == (None, "it writes into out=")
    assert torch.equal(result, eager(x))
    assert torch.equal(model.b, eager.b)


@pytest.mark.filterwarnings("ignore:This overload of:UserWarning")
def test_forms_of_a_call_that_torch_deprecated_are_kept_and_named() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> Any:
        return (
            torch.addmm(0.5, x, 2.0, x, w),  # type: ignore[call-overload]
            torch.addmm(0.5, x, x, w),  # type: ignore[call-overload]
            x.addmm(0.5, 2.0, x, w),  # type: ignore[call-overload]
            torch.baddbmm(0.5, x[None], x[None], w[None]),  # type: ignore[call-overload]
            torch.tensordot(x, w, torch.tensor(1)),
        )

    model, x = Holder(function, w=torch.randn(38, 38)), torch.randn(38, 38)
    result, found = run(model, x)
    first = "its factors come first, a form that torch deprecated"
    reasons = [first] * 4 + ["a tensor says which dimensions tensordot sums"]
    assert [site.decision.reason for site in found] == reasons
    for actual, expected in zip(result, model(x), strict=True):
        assert torch.equal(actual, expected)


# A product of y by w, the first of which or the result z is given another shape then.
RESHAPED: dict[str, tuple[Any, Callable[..., Any], Callable[..., Any]]] = {
    "vector": ((0, 0), F.linear, lambda y, z: y.unsqueeze_(0)),
    "row": ((slice(1), 0), F.linear, lambda y, z: y.squeeze_(0)),
    "matrix": (0, partial(torch.einsum, "mk,nk->nm"), lambda y, z: y.unsqueeze_(0)),
    "transposed": (0, lambda y, w: y @ w.t(), lambda y, z: y.transpose_(0, 1)),
    "result": (0, F.linear, lambda y, z: z.t_()),
    "result by name": (0, F.linear, lambda y, z: torch.ops.aten.unsqueeze_(z, 0)),
    "result by overload": (0, F.linear, lambda y, z: torch.ops.aten.t_.default(z)),
}


@pytest.mark.parametrize("name", RESHAPED)
def test_a_product_of_what_gets_another_shape_later_is_kept_and_named(name: str) -> None:
    """Dynamo has one fake tensor for it, with the last of its shapes."""
    index, product, reshape = RESHAPED[name]

    def function(x: torch.Tensor, w: torch.Tensor) -> Any:
        y = x[index].clone()
        z = product(y, w)
        reshape(y, z)
        return y, z

    model, x = Holder(function, w=torch.randn(38, 57)), torch.randn(3, 7, 57)
    result, (site,) = run(model, x)
    assert site.decision.reason == "the shape of one of its tensors is changed in place"
    for actual, expected in zip(result, model(x), strict=True):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


def test_a_product_of_what_got_another_shape_before_is_rewritten() -> None:
    def function(x: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> Any:
        y = x.exp()
        return F.linear(F.linear(y.squeeze_(1), v), w)

    model, x = Holder(function, v=torch.randn(38, 57), w=torch.randn(57, 38)), torch.randn(3, 1, 57)
    result, found = run(model, x)
    assert [site.decision.method for site in found] == ["int8", "int8"]
    assert error(result, model(x)) < 0.02


def test_what_torch_computes_in_one_call_is_kept_and_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(64, 2, batch_first=True)
            self.encode = nn.TransformerEncoderLayer(64, 2, 96, batch_first=True)
            self.out = nn.Linear(64, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.out(self.encode(self.attend(x, x, x)[0]))
            return out

    model = Net().eval().requires_grad_(False)
    report = explain(model, torch.randn(2, 5, 64), {"method": "int8", "min_features": 1})
    in_one_call = "PyTorch computes its products and its attention in one call"
    assert [(s.layer, s.spelling, s.decision.method) for s in report.sites] == [
        ("attend", "attention", None),
        ("encode", "encoder layer", None),
        ("out", "linear", "int8"),
    ]
    assert [s.decision.reason == in_one_call for s in report.sites] == [True, True, False]


def test_a_product_that_is_the_weight_of_a_layer_is_no_product_of_the_graph() -> None:
    """As an adapter alone: it is computed when its parameters change, and quantized then."""
    tensors = {"a": torch.randn(19, 4), "b": torch.randn(4, 38), "s": torch.rand(())}
    model = Holder(lambda x, a, b, s: F.linear(x, (a * s) @ b), **tensors)
    x = torch.randn(7, 38)
    result, found = run(model, x)
    assert [(site.spelling, site.decision.method) for site in found] == [
        ("@", None), ("linear", "int8"),
    ]  # fmt: skip
    layer = found[1].layer
    assert found[0].decision.reason == f"it computes a part of the weight of {layer!r}"
    weight = (model.a * model.s) @ model.b
    assert error(result, dequantized(x) @ dequantized(weight).T) < 5e-7


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("computed", [False, True])
def test_why_a_weight_of_a_call_is_kept_is_worded_by_where_it_is_from(
    computed: bool, moved: bool
) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        w = w.exp() if computed else w
        return F.linear(x, w.unflatten(0, (2, 19))[1].contiguous() if moved else w)

    _, (site,) = run(Holder(function), torch.randn(7, 38), torch.randn(38, 38))
    where = "computed in the graph" if computed else "an input, no parameter or buffer"
    assert site.decision.reason.partition(" (option")[0] == f"its weight is {where}"
