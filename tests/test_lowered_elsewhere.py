"""Whole graphs that were lowered for absent devices, run on recorded operators."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import fake_gemms
import fake_torch_npu
import pytest
import torch
from conftest import Holder, error, quantized_inputs, traced
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from omniq_compile import QuantConfig, explain
from omniq_compile.lowering.target import ARCHITECTURES, Target
from omniq_compile.passes import dynamo, pipeline
from omniq_compile.passes.context import Context
from omniq_compile.passes.metadata import fill_values

BF16 = torch.bfloat16


def forward(x: torch.Tensor, **weights: torch.Tensor) -> torch.Tensor:
    """An attention's first half and an MLP, of sizes that differ."""
    linear = torch.nn.functional.linear
    q, k = linear(x, weights["q"], weights["q_bias"]), linear(x, weights["k"])
    hidden = torch.nn.functional.gelu(linear(q * k.sigmoid(), weights["up"], weights["up_bias"]))
    return x + linear(hidden, weights["down"])


def model() -> Holder:
    shapes = {
        "q": (320, 256), "q_bias": (320,), "k": (320, 256), "up": (512, 320), "up_bias": (512,),
        "down": (256, 512),
    }  # fmt: skip
    tensors = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    holder = Holder(forward, **{name: tensor.to(BF16) for name, tensor in tensors.items()})
    holder.function = lambda x, *given: forward(x, **dict(zip(shapes, given, strict=True)))
    return holder


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        ("npu:ascend910b", {"method": "int8"}, {"npu_dynamic_quant": 3, "npu_quant_matmul": 4}),
        ("npu:ascend950", {"method": "mxfp8"}, {"npu_dynamic_mx_quant": 3, "npu_quant_matmul": 4}),
        ("npu:ascend950", {"method": "mxfp4"}, {"npu_dynamic_mx_quant": 3, "npu_quant_matmul": 4}),
        ("npu:ascend950", {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0},
         {"npu_dynamic_dual_level_mx_quant": 3, "npu_format_cast": 4,
          "npu_dual_level_quant_matmul": 4}),
        ("xpu:xe", {"method": "int8"}, {"_int_mm": 4}),
        ("xpu:xe", {"method": "fp8"}, {"_scaled_mm": 4}),
        ("rocm:gfx942", {"method": "int8"}, {"_int_mm": 4}),
        ("rocm:gfx942", {"method": "fp8"}, {"_scaled_mm": 4}),
        ("rocm:gfx950", {"method": "fp8"}, {"_scaled_mm": 4}),
        # K = 320 is no multiple of 128 nor of 256: decoded to BF16.
        ("rocm:gfx950", {"method": "mxfp8"}, {"_scaled_mm": 3}),
        ("rocm:gfx950", {"method": "mxfp4"},
         {"shuffle_weight": 3, "e8m0_shuffle": 6, "gemm_a4w4": 3}),
    ],
)  # fmt: skip
def test_a_lowered_graph_does_what_the_quantized_one_says(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    target: str,
    options: dict[str, Any],
    expected: dict[str, int],
) -> None:
    ((graph, inputs),) = traced(model(), torch.randn(2, 11, 256, dtype=BF16))
    fake_gemms.without_own_kernels(monkeypatch)
    place, config = Target.parse(target), QuantConfig.from_options(options)
    recorders = []
    if config.method == "mxfp4" and place.device == "rocm":
        recorders.append(fake_gemms.install_aiter(monkeypatch, tmp_path, place.arch))
    context = Context(config, place, stages={})
    lowered = pipeline.run(graph, context)
    # AITER has to be found to be chosen; the others are there when the graph runs.
    if place.device == "npu":
        module, recorder = fake_torch_npu.install(place.arch)
        monkeypatch.setitem(sys.modules, "torch_npu", module)
        recorders.append(recorder)
    else:
        recorders.append(fake_gemms.install_torch(monkeypatch, place.arch))

    def run(gm: torch.fx.GraphModule, is_lowered: bool) -> torch.Tensor:
        values = quantized_inputs(graph, inputs, context, lowered=is_lowered)
        with torch.no_grad():
            (out,) = gm(*(values[n.name] for n in gm.graph.nodes if n.op == "placeholder"))
        return out

    assert context.stages is not None
    quantized = run(context.stages["quantized"], False)
    out = run(lowered, True)
    assert (out.shape, out.dtype) == (quantized.shape, BF16)
    # The last layer's rounding, and codes that an earlier rounding moved.
    assert error(out, quantized) < (0.04 if "mxfp4" in config.method else 0.015)
    calls = [call.operator for recorder in recorders for call in recorder.calls]
    assert {name: calls.count(name) for name in calls} == expected


@pytest.mark.parametrize("K", [257, 384])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "int8"},
        {"method": "fp8"},
        {"method": "fp8", "weight_block_size": [128, 128]},
        {"method": "mxfp8"},
        {"method": "mxfp4"},
        {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0},
    ],
    ids=str,
)
def test_a_graph_of_symbolic_sizes_is_lowered_for_every_target(
    options: dict[str, Any], K: int
) -> None:
    """With dynamic=True an input's K is a symbol, which its weight fixes; M stays any number."""
    layer = torch.nn.Linear(K, 131, dtype=BF16).requires_grad_(False)
    graphs, guards = [], []

    def record(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        (env,) = {n.node.shape_env for n in inputs if isinstance(n, torch.SymInt)}
        guards.extend(env.guards)
        return gm.forward

    with torch.no_grad():
        call = torch.compile(torch.nn.Sequential(layer), backend=record, dynamic=True)
        call(torch.randn(7, K, dtype=BF16))
    config = QuantConfig.from_options({"min_features": 1} | options)
    for device, architectures in ARCHITECTURES.items():
        for architecture in architectures:
            context = Context(config, Target(device, architecture))
            pipeline.run(graphs[0], context)
            (site,) = context.sites
            rows = site.problem.M
            assert not isinstance(rows, int)
            assert not is_concrete_int(rows)
            assert rows.node.shape_env.guards == guards
            assert site.decision.kernel is not None


def lowered_for(target: str, model: torch.nn.Module, *inputs: torch.Tensor) -> torch.fx.GraphModule:
    ((graph, _),) = traced(model, *inputs)
    config = QuantConfig.from_options({"method": "int8", "min_features": 1})
    return pipeline.run(graph, Context(config, Target.parse(target)))


def values_of(node: torch.fx.Node) -> list[Any]:
    """Return how a node's tensors look."""
    values = torch.utils._pytree.tree_leaves(dynamo.value(node))
    return [(v.shape, v.stride(), v.dtype) for v in values if isinstance(v, torch.Tensor)]


def test_kernels_of_one_activation_may_take_it_in_other_shapes() -> None:
    """`torch._int_mm` takes a matrix; for an N that is no multiple of 8 Triton takes all axes."""
    linear = torch.nn.functional.linear
    w, v = torch.randn(64, 48, dtype=BF16), torch.randn(19, 48, dtype=BF16)
    model = Holder(lambda x, w, v: (linear(x, w), linear(x, v), linear(x, w[:32])), w=w, v=v)
    graph = lowered_for("cuda:sm_100", model, torch.randn(2, 11, 48, dtype=BF16)).graph
    targets = [str(node.target) for node in graph.nodes]
    assert sum("triton_row_scaled_gemm" in target for target in targets) == 1
    assert sum("_int_mm" in target for target in targets) == 2
    (results,) = graph.output_node().args
    assert [tuple(dynamo.value(result).shape) for result in results] == [
        (2, 11, 64), (2, 11, 19), (2, 11, 32),
    ]  # fmt: skip


@pytest.mark.parametrize("target", ["xpu:xe", "cuda:sm_90", "cpu:generic"])
def test_what_a_node_is_known_by_is_what_it_computes(target: str) -> None:
    """Kernels that were traced once are written again for activations that look the same alone."""
    linear = torch.nn.functional.linear
    weights = {"w": torch.randn(48, 64, dtype=BF16), "v": torch.randn(48, 64).half()}

    def function(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> Any:
        return linear(x, w), linear(y.t(), w), linear(x.half(), v), linear(x[:9], w)

    inputs = torch.randn(22, 64, dtype=BF16), torch.randn(64, 22, dtype=BF16)
    graph = lowered_for(target, Holder(function, **weights), *inputs).graph
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    for node in calls:
        known = values_of(node)
        fill_values(node)
        assert values_of(node) == known, node.format_node()
    assert len(calls) > 40


class Scores(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.transpose(-1, -2)


@pytest.mark.parametrize("method", ["mxfp8", "mxfp4"])
@pytest.mark.parametrize("what", ["a bias in float32", "a batch"])
def test_a_row_of_bfloat16_gemms_multiplies_in_bfloat16(what: str, method: str) -> None:
    """Autocast leaves the bias of a float32 layer as it is in the graph."""
    options = {"method": method, "min_features": 1}
    if what == "a batch":
        heads = [torch.randn(4, rows, 64, dtype=BF16) for rows in (128, 96)]
        report = explain(Scores(), heads, options | {"matmul": True}, target="cuda:sm_90")
    else:
        layer = torch.nn.Linear(256, 384).requires_grad_(False)
        with torch.autocast("cpu", BF16):
            report = explain(layer, (torch.randn(200, 256),), options, target="cuda:sm_90")
    (site,), (graph,) = report.sites, report.graphs
    assert site.decision.kernel == f"cuda_{method}_bfloat16"
    (product,) = re.findall(r"\.\w*(?:linear|matmul)\(.*", graph.programs["lowered"])
    assert re.search(r"# bf16\[", product), product
