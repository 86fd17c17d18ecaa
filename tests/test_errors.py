"""A call that asks for gradients says how to do without; every other way of calling works."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Holder, compiled, dequantized, error, sites
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from omniq_compile import GradientError, OmniqError, OptionError, WeightError
from omniq_compile.lowering.errors import nearest, unknown


def product(model: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return dequantized(x) @ dequantized(model.weight).T + model.bias.detach().double()


def test_a_call_with_gradients_says_how_to_turn_them_off() -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(nn.Linear(38, 19))(torch.randn(7, 38))
    assert isinstance(caught.value.inner_exception, GradientError)
    message = str(caught.value)
    assert "omniq is for inference, and 2 inputs or parameters" in message
    for remedy in ("torch.inference_mode()", "torch.no_grad()", "model.requires_grad_(False)"):
        assert remedy in message


class Detached(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


def test_gradients_that_are_dropped_in_the_end_are_computed_all_the_same() -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(Detached(38, 19))(torch.randn(7, 38))
    assert isinstance(caught.value.inner_exception, GradientError)
    assert "and 2 inputs or parameters of this graph require gradients" in str(caught.value)


class Guidance(nn.Module):
    """The gradient of a layer's result, which a caller under no_grad gets."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_(True)
            return torch.autograd.grad(self.score(y).square().sum(), y)[0]


def test_gradients_that_the_model_turns_on_are_refused() -> None:
    model, x = Guidance(), torch.randn(3, 64)
    options = {"method": "int8", "min_features": 1, "compiler": "eager"}
    with torch.no_grad():
        if torch.__version__ >= "2.15":  # whose Dynamo leaves the whole call to Python
            fast = torch.compile(model, backend="omniq", options=options)
            assert torch.equal(fast(x), model(x))
            return
        with pytest.raises(BackendCompilerFailed) as caught:
            torch.compile(model, backend="omniq", options=options)(x)
        assert isinstance(caught.value.inner_exception, GradientError)
        assert "'score'" in str(caught.value.inner_exception)
        torch._dynamo.reset()
        kept = options | {"ignored_layers": ["score"]}
        result = torch.compile(model, backend="omniq", options=kept)(x)
    assert torch.equal(result, model(x))


def test_an_activation_that_requires_gradients_is_refused_too() -> None:
    model = nn.Linear(38, 19).requires_grad_(False)
    with pytest.raises(BackendCompilerFailed, match="and 1 inputs"):
        compiled(model)(torch.randn(7, 38, requires_grad=True))


@pytest.mark.parametrize("context", [torch.no_grad(), torch.inference_mode()])
def test_a_model_with_gradients_runs_where_they_are_off(context: AbstractContextManager) -> None:
    model = nn.Linear(38, 19)
    with context:
        x = torch.randn(7, 38)
        assert error(compiled(model)(x), product(model, x)) < 5e-7


class Decorated(nn.Linear):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Inferring(nn.Linear):
    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Within(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            y = super().forward(x) + self.bias.unsqueeze(0)
        return y - self.bias.detach()


class WithinDecorated(nn.Linear):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            y = super().forward(x) + self.bias
        return y - self.bias  # here gradients are off still


@pytest.mark.parametrize("kind", [Decorated, Inferring, Within, WithinDecorated])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_model_may_turn_gradients_off_itself(
    kind: type[nn.Linear], frozen: bool, compiler: str
) -> None:
    model, x = kind(38, 19).requires_grad_(not frozen), torch.randn(7, 38)
    assert torch.is_grad_enabled()
    result = compiled(model, compiler=compiler)(x)
    assert torch.is_grad_enabled()
    assert not result.requires_grad
    assert error(result, product(model, x)) < 5e-7


def test_a_model_that_leaves_inference_mode_has_the_gradients_of_before() -> None:
    class Leaving(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode(False):
                return super().forward(x)

    model, x = Leaving(38, 19), torch.randn(7, 38)
    with torch.no_grad():
        expected, result = model(x), compiled(model, ignored_layers=["re:.*"])(x)
    assert expected.requires_grad
    assert result.requires_grad
    assert torch.equal(result, expected)


def test_gradients_behind_a_part_without_them_are_refused() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(38, 38), nn.Linear(38, 19)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                x = self.first(x).clone()
            return self.second(x)

    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(Behind(), compiler="eager")(torch.randn(7, 38))
    assert isinstance(caught.value.inner_exception, GradientError)


def test_a_frozen_model_runs_with_gradients_on() -> None:
    model, x = nn.Linear(38, 19).requires_grad_(False), torch.randn(7, 38)
    assert torch.is_grad_enabled()
    result = compiled(model)(x)
    assert not result.requires_grad
    assert error(result, product(model, x)) < 5e-7


def test_a_model_without_values_says_what_needs_none() -> None:
    model = nn.Linear(38, 19, device="meta").requires_grad_(False)
    with pytest.raises(BackendCompilerFailed, match=r"is on the meta device, .*Load its weights"):
        compiled(model)(torch.randn(7, 38, device="meta"))
    (site,) = sites(model, torch.randn(7, 38, device="meta"))
    assert (site.decision.method, site.K, site.N) == ("int8", 38, 19)


def test_one_compiled_model_runs_after_its_refusal() -> None:
    model, x = nn.Linear(38, 19), torch.randn(7, 38)
    run = compiled(model)
    with pytest.raises(BackendCompilerFailed, match="is for inference"):
        run(x)
    for context in (torch.no_grad(), torch.inference_mode(), torch.no_grad()):
        with context:
            assert error(run(x), product(model, x)) < 5e-7
    model.requires_grad_(False)
    assert error(run(x), product(model, x)) < 5e-7


@pytest.mark.parametrize(
    ("autocast", "compiler"),
    [(False, "eager"), (True, "aot_eager"), (True, "eager")],
)
def test_autocast_changes_the_dtype_of_the_result_and_nothing_else(
    autocast: bool, compiler: str
) -> None:
    model, x = nn.Linear(1000, 19).requires_grad_(False), torch.randn(7, 1000)
    dtype = torch.bfloat16 if autocast else torch.float32
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        result = compiled(model, compiler=compiler)(x)
    assert result.dtype is dtype
    assert error(result, product(model, x).to(dtype)) < (1e-4 if autocast else 5e-7)


@pytest.mark.parametrize(
    ("function", "front"), [(torch.addmm, ()), (torch.addmm, (7,)), (torch.baddbmm, (2, 1))]
)
def test_autocast_casts_what_is_added_to_a_product_too(
    function: Any, front: tuple[int, ...]
) -> None:
    """Added as it is, a float32 term would make the result float32."""
    batch = (2,) if function is torch.baddbmm else ()
    x, w, term = torch.randn(*batch, 7, 38), torch.randn(*batch, 38, 19), torch.randn(*front, 19)
    model = Holder(lambda x, w, b: function(b, x, w, alpha=0.5, beta=2), w=w, b=term)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        result = compiled(model)(x)
    assert result.dtype is expected.dtype is torch.bfloat16
    assert 0 < error(result, expected) < 0.02


def test_a_graph_may_return_its_input_and_its_parameter() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(38, 19)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x, "w": self.up.weight, "y": F.silu(self.up(x)), "b": self.up.bias}

    model, x = Model().requires_grad_(False), torch.randn(7, 38)
    for compiler in ("eager", "aot_eager"):
        result = compiled(model, compiler=compiler)(x)
        assert list(result) == ["x", "w", "y", "b"]
        assert result["x"] is x
        assert torch.equal(result["w"], model.up.weight)
        assert result["w"].data_ptr() == model.up.weight.data_ptr()
        assert result["b"].data_ptr() == model.up.bias.data_ptr()
        assert error(result["y"], F.silu(product(model.up, x))) < 1e-6


def test_a_missing_method_is_worded_through_torch_compile() -> None:
    model = nn.Linear(38, 19).requires_grad_(False)
    with pytest.raises(BackendCompilerFailed, match=r"Methods: int8"):
        torch.compile(model, backend="omniq")(torch.randn(7, 38))


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [(OptionError, ValueError), (WeightError, ValueError), (GradientError, RuntimeError)],
)
def test_every_error_is_an_omniq_error_and_a_builtin(kind: type, builtin: type) -> None:
    assert issubclass(kind, OmniqError)
    assert issubclass(kind, builtin)


def test_the_nearest_name_comes_first_and_strangers_are_left_out() -> None:
    names = ["inductor", "aot_eager", "eager"]
    assert nearest("eagre", names) == ["eager", "aot_eager"]
    assert nearest("zzz", names) == []
    assert unknown("compiler", "eagre", names) == (
        "unknown compiler 'eagre'. Did you mean 'eager'? Valid: inductor, aot_eager, eager."
    )
    assert unknown("compiler", "zzz", names).startswith("unknown compiler 'zzz'. Valid: ")
