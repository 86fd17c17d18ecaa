"""A weight that is computed from parameters alone is quantized once, outside of the graph."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS, Holder, compiled, dequantized, error, run, sites
from torch import nn
from torch.nn.utils import parametrizations

import omniq_compile as omniq
from omniq_compile.compiling.weights import statistics
from omniq_compile.inspector.document import render_json
from omniq_compile.inspector.inspection import inspect
from omniq_compile.inspector.page import render_page
from omniq_compile.inspector.text import render
from omniq_compile.passes.legal import STAGES
from omniq_compile.passes.sites import Kind

N, K, R = 19, 38, 3
Weight = Callable[..., torch.Tensor]

# name: a weight [N, K] of w [N, K], g [N, 1], a [R, K], b [N, R] and a scale s []
WEIGHTS: dict[str, Weight] = {
    "scaled": lambda w, g, a, b, s: w * 2,
    "scaled_by_parameter": lambda w, g, a, b, s: s * w,
    "by_rows": lambda w, g, a, b, s: torch.mul(w, g.exp()),
    "lora": lambda w, g, a, b, s: w + b @ a * s,
    "lora_by_functions": lambda w, g, a, b, s: torch.add(w, torch.mm(b, a), alpha=0.5),
    "lora_by_addmm": lambda w, g, a, b, s: torch.addmm(w, b, a, alpha=2),
    "lora_by_einsum": lambda w, g, a, b, s: w.sub(torch.einsum("nr,rk->nk", b, a)),
    "lora_of_scaled": lambda w, g, a, b, s: w + (b * s) @ a,
    "dora": lambda w, g, a, b, s: g * F.normalize(w + b @ a, dim=1),
    "weight_norm": lambda w, g, a, b, s: torch._weight_norm(w, g, 0),
    "by_norm": lambda w, g, a, b, s: w / (w.norm(dim=1, keepdim=True) + 1e-4) * math.sqrt(3),
    "by_torch_norm": lambda w, g, a, b, s: w / torch.norm(w, dim=1, keepdim=True),
    "by_linalg_norm": lambda w, g, a, b, s: w / torch.linalg.norm(w, dim=1, keepdim=True),
    "by_vector_norm": lambda w, g, a, b, s: (
        w / torch.add(1e-4, torch.linalg.vector_norm(w, dim=1, keepdim=True), alpha=0.1)
    ),
    "demodulated": lambda w, g, a, b, s: w * w.square().sum(1, keepdim=True).add(1e-8).rsqrt(),
    "standardised": lambda w, g, a, b, s: (
        (w - w.mean(1, keepdim=True)) / torch.sqrt(w.var(1, keepdim=True) + 1e-5)
    ),
    "gated": lambda w, g, a, b, s: w * torch.sigmoid(g) * g.tanh() + F.softplus(s),
    "clamped": lambda w, g, a, b, s: -abs(w.clamp(-1, 1)) ** 2,
    "outer": lambda w, g, a, b, s: w + torch.outer(g[:, 0], a[0]),
    "kron": lambda w, g, a, b, s: torch.kron(g, a[:1]),
    "in_float32": lambda w, g, a, b, s: (w.float() / w.float().norm()).to(w.dtype).T.T * 5,
    "ternary": lambda w, g, a, b, s: torch.where(w > 0.5, s, (w * 3).round() * g),
}  # fmt: skip


def parameters() -> dict[str, torch.Tensor]:
    shapes = {"w": (N, K), "g": (N, 1), "a": (R, K), "b": (N, R), "s": ()}
    return {name: torch.randn(shape) + 0.1 for name, shape in shapes.items()}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_of_parameters_alone_is_quantized(name: str, compiler: str) -> None:
    weight = WEIGHTS[name]
    model = Holder(lambda x, *tensors: F.linear(x, weight(*tensors)), **parameters())
    x = torch.randn(7, K)
    before = statistics()["quantized"]
    result, found = run(model, x, compiler=compiler)
    site = found[-1]
    assert (site.spelling, site.kind, site.decision.method) == ("linear", Kind.WEIGHT, "int8")
    assert [s.decision.method for s in found[:-1]] == [None] * (len(found) - 1)
    assert statistics()["quantized"] == before + 1
    tensors = [getattr(model, name).double() for name in model.names]
    assert error(result, dequantized(x) @ dequantized(weight(*tensors)).T) < 2e-3
    tensors = [getattr(model, name) for name in model.names]
    assert error(result, dequantized(x) @ dequantized(weight(*tensors)).T) < 5e-7


@pytest.mark.parametrize("name", ["lora", "dora", "gated"])
def test_each_parameter_of_a_weight_is_followed(name: str) -> None:
    weight = WEIGHTS[name]
    model = Holder(lambda x, *tensors: F.linear(x, weight(*tensors)), **parameters())
    used = [site.weight for site in sites(model, torch.randn(7, K))][-1].split(" + ")
    assert set(used) == {"lora": {*"wabs"}, "dora": {*"wgab"}, "gated": {*"wgs"}}[name]
    fast = compiled(model)
    for by_data in (False, True):
        for leaf in (*used, *used):
            x = torch.randn(7, K)
            fast(x)
            parameter = getattr(model, leaf)
            (parameter.data if by_data else parameter).copy_(torch.randn(parameter.shape) + 0.1)
            current = weight(*(getattr(model, n) for n in model.names))
            before = statistics()["quantized"]
            assert error(fast(x), dequantized(x) @ dequantized(current).T) < 5e-7, leaf
            assert statistics()["quantized"] == before + 1
            fast(x)
            assert statistics()["quantized"] == before + 1


# name: other spellings of the product by a weight v [N, K]
SPELLED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "matmul": lambda x, v: x @ v.T,
    "on_the_left": lambda x, v: (v @ x.T).T,
    "inner": lambda x, v: torch.inner(v, x).T,
    "einsum": lambda x, v: torch.einsum("nk,mk->mn", v, x),
}


@pytest.mark.parametrize("name", SPELLED)
def test_every_spelling_takes_a_computed_weight(name: str) -> None:
    model = Holder(lambda x, w, g: SPELLED[name](x, w * g), w=torch.randn(N, K), g=torch.randn(K))
    x = torch.randn(7, K)
    result, (site,) = run(model, x)
    assert (site.kind, site.decision.method) == (Kind.WEIGHT, "int8")
    assert error(result, dequantized(x) @ dequantized(model.w * model.g).T) < 5e-7


def test_what_is_computed_of_parameters_is_multiplied_by_a_parameter_as_before() -> None:
    """Learned tokens, by a weight on either side; two constants stay as they are."""

    def function(x: torch.Tensor, w: torch.Tensor, tokens: torch.Tensor) -> Any:
        some = torch.tanh(tokens) * 2
        return F.linear(some, w), w @ some.T, F.linear(some, w * 2), F.linear(tokens, w), x

    model = Holder(function, w=torch.randn(N, K), tokens=torch.randn(7, K))
    result, found = run(model, torch.randn(1))
    assert [(s.kind, s.decision.method) for s in found] == [
        (Kind.WEIGHT, "int8"),
        (Kind.WEIGHT, "int8"),
        (Kind.ACTIVATION, None),
        (Kind.CONSTANT, None),
    ]
    some = torch.tanh(model.tokens) * 2
    exact = dequantized(some) @ dequantized(model.w).T
    assert error(result[0], exact) < 5e-7
    assert error(result[1], exact.T) < 5e-7
    torch.testing.assert_close(result[2], F.linear(some, model.w * 2))
    torch.testing.assert_close(result[3], F.linear(model.tokens, model.w))


def test_a_product_inside_of_a_weight_is_computed_with_it() -> None:
    """Where its weight is kept it is a layer as any other."""
    model = Holder(lambda x, *t: F.linear(x, WEIGHTS["lora_of_scaled"](*t)), **parameters())
    x = torch.randn(7, K)
    inside, whole = sites(model, x)
    reason = f"it computes a part of the weight of {whole.layer!r}"
    assert (inside.spelling, inside.decision.method, inside.decision.reason) == ("@", None, reason)
    assert whole.decision.method == "int8"

    def function(x: torch.Tensor, w: torch.Tensor, g: Any, a: Any, b: Any, s: Any) -> Any:
        return (x.double() @ (w + (b * s) @ a).double().T).float()

    torch._dynamo.reset()
    inside, whole = sites(Holder(function, **parameters()), x)
    assert (inside.decision.method, whole.decision.method) == ("int8", None)


def test_every_form_of_an_inspection_shows_both() -> None:
    model = Holder(lambda x, *t: F.linear(x, WEIGHTS["lora_of_scaled"](*t)), **parameters())
    inspection = inspect("Holder", model, [torch.randn(7, K)], OPTIONS, kernels=False)
    first, second = (view.code for part in inspection.parts for view in part.sites)
    assert [*first] == ["traced"]
    assert [*second] == ["traced", "quantized", "lowered"]
    for text in (render(inspection, STAGES), render_page(inspection), render_json(inspection)):
        assert "a part of the weight of" in text
    for stage in ("quantized", "lowered"):
        assert "@" not in inspection.program(stage).replace("@torch", "")


class Normalised(nn.Linear):
    """As in EDM2, whose numbers are NumPy's, with a gain or without."""

    def __init__(self, gain: bool) -> None:
        super().__init__(K, N, bias=False)
        self.gain = nn.Parameter(torch.tensor(1.5)) if gain else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight.to(torch.float32)
        norm = torch.linalg.vector_norm(w, dim=[1], keepdim=True, dtype=torch.float32)
        norm = torch.add(1e-4, norm, alpha=np.sqrt(norm.numel() / w.numel()))
        w = w / norm.to(w.dtype)
        w = w * (self.gain / np.sqrt(w[0].numel()))
        return F.linear(x, w.to(x.dtype))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(K, N))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(K, N)),
    "weight_norm_by_hooks": old_weight_norm,
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(K, N)).eval(),
    "edm2": lambda: Normalised(gain=False),
    "edm2_with_gain": lambda: Normalised(gain=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules_that_compute_their_weight(name: str, dtype: torch.dtype) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = MODULES[name]()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    model = Net().to(dtype).requires_grad_(False)
    x = torch.randn(7, K).to(dtype)
    site = [s for s in sites(model, x) if s.spelling == "linear"][-1]
    assert (site.layer, site.decision.method) == ("layer", "int8")
    fast = compiled(model)
    for _ in range(2):
        assert error(fast(x), copy.deepcopy(model)(x)) < 0.015
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))


def test_numbers_of_numpy_leave_nothing_in_the_graph() -> None:
    inspection = inspect("Holder", Normalised(gain=True), [torch.randn(7, K)], OPTIONS)
    assert "wrapped_sqrt" in inspection.program("traced")
    assert "wrapped" not in inspection.program("quantized")


# name: near misses, of which each call computes another weight
KEPT: dict[str, Weight] = {
    "hypernetwork": lambda x, w: w * torch.tanh(x).mean(),
    "demodulated_by_style": lambda x, w: F.normalize(w * x[:1], dim=1),
    "random": lambda x, w: w + torch.randn_like(w),
    "dropout": lambda x, w: F.dropout(w * 2, 0.5, training=True),
    "made_in_the_graph": lambda x, w: w * torch.ones(K),
    "of_a_number": lambda x, w: torch.as_tensor(np.sqrt(5)).float().expand(N, K),
    "by_numpy": lambda x, w: w * torch.from_numpy(np.sqrt(np.ones(K, np.float32))),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_weight_of_more_than_parameters_is_kept(name: str) -> None:
    model = Holder(lambda x, w: F.linear(x, KEPT[name](x, w)), w=torch.randn(N, K))
    x = torch.randn(7, K)
    torch.manual_seed(3)
    result, (site,) = run(model, x)
    assert (site.kind, site.decision.method) == (Kind.ACTIVATION, None)
    if name not in ("random", "dropout"):
        assert torch.equal(result, model(x))


# name: a write, in each call, to what the weight is computed from or of
WRITES: dict[str, Weight] = {
    "parameter": lambda x, w: w.mul_(1.5) * 2,
    "after": lambda x, w: (w * 2, w.add_(1.0))[0],
    "result": lambda x, w: (w * 2).add_(1.0),
    "operator": lambda x, w: (w * 2).__iadd__(1.0),
    "view": lambda x, w: (w * 2, w.T[3].fill_(9.0))[0],
    "out": lambda x, w: torch.mul(w, 1.5, out=w) * 2,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_weight_of_what_the_graph_writes_to_is_kept(name: str) -> None:
    model = Holder(lambda x, w: F.linear(x, WRITES[name](x, w)), buffers=True, w=torch.randn(N, K))
    x = torch.randn(7, K)
    eager = copy.deepcopy(model)
    result, (site,) = run(model, x)
    assert site.decision.method is None
    for _ in range(2):
        assert torch.equal(result, eager(x))
        assert torch.equal(model.w, eager.w)
        result = compiled(model)(x)


def test_spectral_norm_in_training_writes_to_its_vectors() -> None:
    model = parametrizations.spectral_norm(nn.Linear(K, N)).train().requires_grad_(False)
    eager, x = copy.deepcopy(model), torch.randn(7, K)
    (site,) = [s for s in sites(copy.deepcopy(model), x) if s.spelling == "linear"]
    assert site.decision.method is None
    fast = compiled(model)
    for _ in range(3):
        torch.testing.assert_close(fast(x), eager(x))


@pytest.mark.parametrize("where", ["around", "inside", "off inside", "on again"])
def test_a_weight_that_autocast_computes_is_kept(where: str) -> None:
    def function(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        if where == "around":
            return F.linear(x, w + b @ a)
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "off inside"):
            if where == "on again":
                with torch.autocast("cpu", enabled=False):
                    x = x.tanh()
            merged = w + b @ a
        return F.linear(x, merged)

    tensors = parameters()
    model = Holder(function, **{name: tensors[name] for name in "wab"})
    x = torch.randn(7, K)
    with torch.autocast("cpu", torch.bfloat16, enabled=where in ("around", "off inside")):
        result, found = run(model, x)
        expected = model(x)
    site = found[-1]
    if where != "off inside":
        assert site.decision.method is None
        assert torch.equal(result, expected)
        return
    # Evaluated in a call with autocast on: in float32 all the same.
    assert site.decision.method == "int8"
    exact = dequantized(x) @ dequantized(model.w + model.b @ model.a).T
    assert error(result, exact) < 2.0**-8


def test_a_computed_weight_of_a_stored_one_is_its_values() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight * 2)

    model = Scaled(K, N).requires_grad_(False)
    omniq.quantize_(model, OPTIONS)
    x = torch.randn(7, K)
    result, (site,) = run(model, x)
    assert site.decision.method == "int8"
    values = model.weight.dequantize()  # type: ignore[operator]
    assert error(result, dequantized(x) @ dequantized(values * 2).T) < 5e-7


@pytest.mark.parametrize("view", ["view", "as_strided"])
@pytest.mark.parametrize("method", ["int8", "mxfp8", "mxfp4"])
def test_a_view_of_a_stored_weight_is_of_values_without_gaps(method: str, view: str) -> None:
    """Formats with blocks pad the rows, and float32 values were a part of that."""

    class Viewed(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            shape = (-1,) if view == "view" else ((N * K,), (1,))
            return super().forward(x), getattr(self.weight, view)(*shape) * 2

    options = OPTIONS | {"method": method, "compiler": "aot_eager"}
    model = Viewed(K, N).requires_grad_(False)
    omniq.quantize_(model, options)
    _, actual = compiled(model, **options)(torch.randn(7, K))
    values = model.weight.dequantize()  # type: ignore[operator]
    assert torch.equal(actual, values.flatten() * 2)
