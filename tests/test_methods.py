"""Every method through the backend: tight to its own arithmetic, loose to full precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import omniq_compile
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.schemes import get_scheme, w4a8

# (options, worst relative error of one product of normal matrices)
METHODS: list[tuple[dict[str, Any], float]] = [
    ({"method": "int8"}, 0.013),
    ({"method": "fp8"}, 0.04),
    ({"method": "FP8", "weight_block_size": [64, 32]}, 0.04),
    ({"method": "mxfp8"}, 0.05),
    ({"method": "mxfp4"}, 0.18),
    ({"method": "mxfp4", "mxfp4_scale_alg": 2}, 0.17),
    ({"method": "mxfp4", "w4a8_fallback_layers": ["re:.*"]}, 0.14),
    ({"method": "mxfp4-dualscale", "num_bf16_fallback_layers": 0}, 0.18),
    (
        {"method": "mxfp4_dualscale", "mxfp4_scale_alg": 2, "num_bf16_fallback_layers": 0},
        0.17,
    ),
]


def compiled(model: nn.Module, options: dict[str, Any], compiler: str = "eager") -> Any:
    return torch.compile(
        model, backend="omniq", options={"min_features": 1, "compiler": compiler} | options
    )


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def decoded(x: torch.Tensor, name: str) -> torch.Tensor:
    form = get_format(name)
    return form.dequantize(form.quantize(x)).double()[..., : x.shape[-1]]


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize(("options", "loose"), METHODS, ids=lambda v: str(v)[:60])
def test_a_linear_is_tight_to_its_operands_and_loose_to_full_precision(
    options: dict[str, Any], loose: float, compiler: str
) -> None:
    layer, x = frozen(nn.Linear(1075, 45)), torch.randn(3, 17, 1075)
    out = compiled(nn.Sequential(layer), options, compiler)(x)
    scheme = omniq_compile.QuantConfig.from_options(options).scheme
    if "w4a8_fallback_layers" in options:
        scheme = w4a8(scheme)
    a, b = decoded(x, scheme.activation), decoded(layer.weight, scheme.weight)
    assert relative(out, a @ b.T + layer.bias.double()) < 1e-5
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    assert relative(out, exact) < loose


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [options for options, _ in METHODS if options["method"] != "int8"],
    ids=str,
)
def test_bfloat16_emulation_is_exact_too(
    options: dict[str, Any], dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(45, 1075, dtype=dtype))
            self.bias = None
            if bias_dtype is not None:
                self.bias = nn.Parameter(torch.randn(45, dtype=bias_dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
                return F.linear(x, self.weight, self.bias)

    layer, x = frozen(Layer()), torch.randn(3, 17, 1075, dtype=dtype)
    if dtype is torch.float32 and bias_dtype is torch.bfloat16:
        layer.bias = nn.Parameter(layer.bias.float(), False)
    options = options | {"target": "cpu:avx512_bf16"}
    scheme = omniq_compile.QuantConfig.from_options(options).scheme
    if "w4a8_fallback_layers" in options:
        scheme = w4a8(scheme)
    out = compiled(layer, options)(x)
    report = omniq_compile.explain(layer, [x], {"min_features": 1} | options)
    assert [s.decision.kernel for s in report.sites] == [f"cpu_{scheme.method}_bfloat16"]
    exact = decoded(x, scheme.activation) @ decoded(layer.weight, scheme.weight).T
    if layer.bias is not None:
        exact = exact + layer.bias.double()
    # One rounding to the result's dtype, and the order of accumulation.
    step = torch.finfo(dtype).eps / 2
    bound = exact.abs() * step * 1.001 + exact.abs().amax() * 1e-5
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("options", "loose"), METHODS, ids=lambda v: str(v)[:60])
def test_two_activations_are_quantized_per_row_of_both(
    options: dict[str, Any], loose: float
) -> None:
    class Scores(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return q @ k.transpose(-1, -2)

    q, k = torch.randn(2, 7, 70), torch.randn(2, 11, 70)
    out = compiled(Scores(), options | {"matmul": True})(q, k)
    name = omniq_compile.QuantConfig.from_options(options).scheme.activation
    assert relative(out, decoded(q, name) @ decoded(k, name).transpose(-1, -2)) < 1e-5
    assert relative(out, q.double() @ k.double().transpose(-1, -2)) < 1.5 * loose


@pytest.mark.parametrize(("options", "_loose"), METHODS, ids=lambda v: str(v)[:60])
def test_a_bad_token_stays_alone_and_a_zero_token_is_the_bias(
    options: dict[str, Any], _loose: float
) -> None:
    layer, x = frozen(nn.Linear(70, 45)), torch.randn(6, 70)
    x[1, 3], x[2, 4], x[3] = math.nan, math.inf, 0
    out = compiled(nn.Sequential(layer), options)(x)
    assert not out[1].isfinite().any()
    assert not out[2].isfinite().any()
    assert torch.equal(out[3], layer.bias)
    assert out[[0, 4, 5]].isfinite().all()


def test_more_activation_bits_err_less() -> None:
    """BF16 beats W4A8 beats W4A4, on activations with outlier channels."""
    model = frozen(nn.Sequential(nn.Linear(256, 192), nn.GELU(), nn.Linear(192, 256)))
    x = torch.randn(64, 256)
    x[:, ::50] *= 20
    exact = model.double()(x.double())
    model.bfloat16()
    x = x.bfloat16()
    errors = [
        relative(run(x), exact)
        for run in (
            model,
            compiled(model, {"method": "mxfp4", "w4a8_fallback_layers": ["0", "2"]}),
            compiled(model, {"method": "mxfp4"}),
        )
    ]
    assert errors == sorted(errors)
    assert errors[2] > 1.1 * errors[1] > 1.1 * errors[0]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Tower(nn.Module):
    """Blocks under two names; the ones registered first are run last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(38, 64)
        self.late = nn.ModuleList(Block(64) for _ in range(3))
        self.early = nn.ModuleList(Block(64) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in (*self.early, *self.late):
            x = block(x)
        return x


def kept_blocks(options: dict[str, Any]) -> set[str]:
    report = omniq_compile.explain(
        frozen(Tower()), (torch.randn(5, 38),), {"min_features": 1} | options
    )
    leading = [s.layer for s in report.kept if "leading blocks" in s.decision.reason]
    return {layer.rpartition(".")[0] for layer in leading}


def test_leading_blocks_are_those_that_the_model_runs_first() -> None:
    options = {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 3}
    assert kept_blocks(options) == {"early.0", "early.1", "late.0"}


def test_five_blocks_stay_bf16_by_default_and_none_with_zero() -> None:
    assert len(kept_blocks({"method": "mxfp4_dualscale"})) == 5
    assert kept_blocks({"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0}) == set()


class Mixing(nn.Module):
    """A block with a layer in it, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(64, 64)), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x @ self.weight)


def test_a_weight_that_a_leading_block_itself_holds_is_kept() -> None:
    options = {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1, "min_features": 1}
    model = frozen(nn.Sequential(Mixing(), Mixing()))
    report = omniq_compile.explain(model, (torch.randn(5, 64),), options)
    assert [s.layer for s in report.kept] == ["0", "0.layer"]
    assert [s.layer for s in report.rewritten] == ["1", "1.layer"]


def test_a_block_compiled_alone_is_an_error_when_its_place_matters() -> None:
    block = frozen(Block(64))
    run = compiled(block, {"method": "mxfp4_dualscale"})
    with pytest.raises(BackendCompilerFailed, match=r"omniq_compile\.compile"):
        run(torch.randn(5, 64))


def test_a_graph_after_a_break_is_an_error_when_its_place_matters() -> None:
    class Broken(Tower):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            for block in self.early:
                x = block(x)
            torch._dynamo.graph_break()
            for block in self.late:
                x = block(x)
            return x

    run = compiled(frozen(Broken()), {"method": "mxfp4_dualscale"})
    with pytest.raises(BackendCompilerFailed, match="after a graph break"):
        run(torch.randn(5, 38))


STEPS = {"method": "mxfp4", "w4a8_fallback_steps": [0, 2]}


def test_listed_steps_use_mxfp8_activations() -> None:
    model, x = nn.Sequential(frozen(nn.Linear(70, 45))), torch.randn(9, 70)
    run = compiled(model, STEPS)
    w4a4 = compiled(model, {"method": "mxfp4"})(x)
    wide = compiled(model, {"method": "mxfp4", "w4a8_fallback_layers": ["0"]})(x)
    assert not torch.equal(w4a4, wide)
    for step, expected in enumerate((wide, w4a4, wide, w4a4)):
        with omniq_compile.denoise_step(step):
            assert torch.equal(run(x), expected)


def test_a_pipeline_steps_on_through_its_callback() -> None:
    model, x = nn.Sequential(frozen(nn.Linear(70, 45))), torch.randn(9, 70)
    run = compiled(model, STEPS)
    outputs = []
    with omniq_compile.denoise_step(0) as callback:
        for step in range(3):
            outputs.append(run(x))
            assert callback(None, step, 0.5, {"latents": x}) == {"latents": x}
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_a_step_list_without_a_step_is_an_error() -> None:
    run = compiled(nn.Sequential(frozen(nn.Linear(70, 45))), STEPS)
    with pytest.raises(omniq_compile.OptionError, match="denoise_step"):
        run(torch.randn(9, 70))
    with omniq_compile.denoise_step(1):
        run(torch.randn(9, 70))
    with pytest.raises(omniq_compile.OptionError, match="no denoising step is published"):
        run(torch.randn(9, 70))


@pytest.mark.parametrize("step", [-1, True, 0.5, None])
def test_a_step_is_checked(step: Any) -> None:
    with pytest.raises(omniq_compile.OptionError, match="denoising step"):
        omniq_compile.denoise_step(step)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "int8", "weight_block_size": [128, 128]}, "for method fp8, not for 'int8'"),
        ({"method": "mxfp4", "num_bf16_fallback_layers": 2}, "for method mxfp4_dualscale"),
        ({"method": "fp8", "mxfp4_scale_alg": 0}, "for method mxfp4 and mxfp4_dualscale"),
        ({"method": "mxfp8", "w4a8_fallback_steps": [1]}, "for method mxfp4,"),
        ({"method": "fp8", "weight_block_size": [128]}, "two integers"),
        ({"method": "fp8", "weight_block_size": [0, 128]}, "two integers"),
        ({"method": "fp8", "weight_block_size": "128x128"}, "two integers"),
        ({"method": "mxfp4", "mxfp4_scale_alg": 1}, "0 .OCP"),
        ({"method": "mxfp4", "w4a8_fallback_steps": [-1]}, "zero-based"),
        ({"method": "mxfp4", "w4a8_fallback_layers": "attn"}, "list of layer patterns"),
        ({"method": "mxfp4_dualscale", "num_bf16_fallback_layers": -1}, "at least 0"),
    ],
)
def test_options_of_a_method_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(omniq_compile.OptionError, match=words):
        omniq_compile.QuantConfig.from_options(options)


def test_schemes_are_named_by_their_formats() -> None:
    assert str(get_scheme("mxfp8")) == "mxfp8"
    assert str(w4a8(get_scheme("mxfp4"))) == "mxfp4 (mxfp8 x mxfp4)"
    assert get_scheme("fp8", 0, (64, 32)).weight == "fp8_block_64x32"
