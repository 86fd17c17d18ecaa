"""Weights that are quantized alone, activation_scheme 'none': numbers, kernels and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import compiled, error, run, sites
from torch import nn

from omniq_compile import OptionError, QuantConfig, explain, quantize_
from omniq_compile.lowering.formats import get_format

BF16 = torch.bfloat16
NONE = {"activation_scheme": "none", "min_features": 1}
# (options, worst relative error of one product of normal matrices)
METHODS: list[tuple[dict[str, Any], float]] = [
    ({"method": "int8"}, 0.009),
    ({"method": "fp8"}, 0.028),
    ({"method": "fp8", "weight_block_size": [64, 32]}, 0.028),
    ({"method": "fp8", "weight_block_size": [5, 48]}, 0.028),
    ({"method": "mxfp8"}, 0.035),
    ({"method": "mxfp4"}, 0.13),
    ({"method": "mxfp4", "mxfp4_scale_alg": 2}, 0.12),
    ({"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0}, 0.13),
]
by_method = pytest.mark.parametrize(("options", "loose"), METHODS, ids=lambda v: str(v)[:60])
# One rounding of a decoded weight, and one of a result.
TIGHT = {BF16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}


class Layer(nn.Module):
    def __init__(self, K: int = 203, N: int = 83, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.linear = nn.Linear(K, N, dtype=dtype).requires_grad_(False)
        self.linear.weight.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result


def values(weight: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    form = get_format(QuantConfig.from_options(NONE | options).scheme.weight)
    return form.dequantize(form.quantize(weight)).double()[..., : weight.shape[-1]]


def check(
    layer: Layer, x: torch.Tensor, out: torch.Tensor, options: dict[str, Any], loose: float
) -> None:
    weight, bias = layer.linear.weight, layer.linear.bias.double()
    assert out.dtype is x.dtype
    exact = x.double() @ values(weight, options).T + bias
    assert error(out, exact) < TIGHT[x.dtype]
    assert 1e-3 < error(out, x.double() @ weight.double().T + bias) < loose


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16])
@pytest.mark.parametrize("K", [203, 224])
@by_method
def test_a_linear_multiplies_activations_as_they_are(
    options: dict[str, Any], loose: float, K: int, dtype: torch.dtype
) -> None:
    layer, x = Layer(K, dtype=dtype), torch.randn(2, 19, K, dtype=dtype)
    x[0, 3, 5] = 30
    check(layer, x, compiled(layer, **NONE | options)(x), options, loose)


@pytest.mark.parametrize("target", ["cpu:avx512_bf16", "cpu:avx512_vnni", "cpu:generic"])
@by_method
def test_tiles_of_a_weight_are_decoded_on_cpus(
    options: dict[str, Any], loose: float, target: str
) -> None:
    layer, x = Layer(1056, 150), torch.randn(70, 1056, dtype=BF16)
    out = compiled(layer, **NONE | options, target=target)(x)
    check(layer, x, out, options, loose)
    method = options["method"]
    tiles = "bfloat16" if target == "cpu:avx512_bf16" else "float32_tiles"
    few_columns = options.get("weight_block_size") == [5, 48]
    name = "weight_only" if method == "int8" or few_columns else tiles
    (site,) = sites(layer, x, **NONE | options, target=target)
    assert site.decision.kernel == f"cpu_{method}_{name}"


@pytest.mark.parametrize("K", [203, 224])
def test_inductor_compiles_every_method(K: int) -> None:
    """One graph of all layers would be of one method: these are as many graphs, each small."""
    for options, loose in METHODS[::2] + METHODS[-1:]:
        layer, x = Layer(K), torch.randn(2, 19, K, dtype=BF16)
        out = compiled(layer, **NONE | options, compiler="inductor")(x)
        check(layer, x, out, options, loose)


@pytest.mark.parametrize(("scheme", "quantizes"), [("none", 0), ("dynamic", 1)])
def test_no_activation_is_quantized_in_the_graph(scheme: str, quantizes: int) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (nn.Linear(96, 70, dtype=BF16) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) * self.k(x)

    inputs = (torch.randn(5, 96, dtype=BF16),)
    options = {"method": "int8", "min_features": 1, "activation_scheme": scheme}
    (graph,) = explain(Two().requires_grad_(False), inputs, options).graphs
    text = graph.programs["quantized"]
    assert (text.count("omniq.quantize.default("), text.count("omniq.gemm.")) == (quantizes, 2)


@pytest.mark.parametrize(
    ("target", "options", "M", "K", "kernel"),
    [
        ("cuda:sm_90", {"method": "int8"}, 4096, 96, "cuda_int8_weight_only"),
        ("cuda:sm_90", {"method": "fp8"}, 1, 96, "cuda_fp8_weight_only"),
        ("cuda:sm_80", {"method": "fp8"}, 4096, 203, "cuda_fp8_weight_only_triton"),
        ("cuda:sm_90", {"method": "mxfp8"}, 33, 96, "cuda_mxfp8_decoded_triton"),
        ("cuda:sm_90", {"method": "mxfp8"}, 33, 97, "cuda_mxfp8_weight_only"),
        ("cuda:sm_90", {"method": "mxfp4"}, 4096, 96, "cuda_mxfp4_weight_only"),
        ("cuda:sm_100", {"method": "mxfp4"}, 33, 96, "cuda_mxfp4_weight_only"),
        ("rocm:gfx950", {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0}, 33, 96,
         "rocm_mxfp4_dualscale_weight_only"),
        ("xpu:xe", {"method": "int8"}, 33, 96, "xpu_int8_weight_only"),
        ("npu:ascend950", {"method": "mxfp8"}, 33, 96, "npu_mxfp8_weight_only"),
    ],
)  # fmt: skip
def test_native_kernels_are_not_for_it(
    target: str, options: dict[str, Any], M: int, K: int, kernel: str
) -> None:
    report = explain(Layer(K), (torch.randn(M, K, dtype=BF16),), NONE | options, target=target)
    (site,) = report.sites
    assert (site.decision.kernel, site.decision.method) == (kernel, options["method"])


@by_method
def test_a_stored_weight_is_what_uncompiled_code_works_on(
    options: dict[str, Any], loose: float
) -> None:
    layer, x = Layer(), torch.randn(2, 19, 203, dtype=BF16)
    quantize_(layer, NONE | options)
    out = compiled(layer, **NONE | options)(x)
    assert error(out, layer(x)) < TIGHT[BF16]


@by_method
def test_autocast_casts_activations_that_stay_as_they_are(
    options: dict[str, Any], loose: float
) -> None:
    class Cast(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", BF16):
                return super().forward(x)

    layer, x = Cast(224, dtype=torch.float32), torch.randn(19, 224)
    out = compiled(layer, **NONE | options)(x)
    check(layer, x.to(BF16), out, options, loose)


def test_autocast_and_batches_of_matrices_are_multiplied_in_their_results_dtype() -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 83, 96), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", BF16):
                return x @ self.weight.transpose(-1, -2)

    model, x = Batched(), torch.randn(3, 19, 96)
    options = {"method": "int8"} | NONE
    out, (site,) = run(model, x, **options)
    assert site.decision.method == "int8"
    assert out.dtype is BF16
    assert error(out, x.double() @ values(model.weight, options).transpose(-1, -2)) < 6e-3


@pytest.mark.parametrize(
    "more",
    [
        {"method": "int8", "matmul": True},
        {"method": "mxfp4", "w4a8_fallback_layers": ["x"]},
        {"method": "mxfp4", "w4a8_fallback_steps": [0]},
    ],
)
def test_options_that_quantize_activations_are_refused(more: dict[str, Any]) -> None:
    name = list(more)[1]
    with pytest.raises(OptionError, match=f"'{name}' is .*'activation_scheme' is 'none'"):
        QuantConfig.from_options({"activation_scheme": "none"} | more)
