"""The runner: the original graph is left alone, passes are recorded, promises are checked."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS, Holder, count, dequantized, error, stage_inputs, traced
from torch import fx, nn

from omniq_compile import OmniqError, OptionError, QuantConfig
from omniq_compile.lowering.target import detect
from omniq_compile.passes import dynamo, legal, pipeline
from omniq_compile.passes.context import Context
from omniq_compile.passes.lower import lower
from omniq_compile.passes.rewrite import GEMM, QUANTIZE


class Model(nn.Module):
    """Two linears on one activation, one kept, one after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(38, 19), nn.Linear(38, 23, bias=False)
        self.kept, self.out = nn.Linear(38, 21), nn.Linear(19, 38)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.out(F.gelu(self.q(x))), self.k(x), self.kept(x)


def trace() -> tuple[Model, fx.GraphModule, list[Any]]:
    model = Model()
    ((gm, inputs),) = traced(model, torch.randn(7, 38))
    return model, gm, inputs


def new_context() -> Context:
    config = QuantConfig.from_options(OPTIONS | {"ignored_layers": ["kept"]})
    return Context(config, detect("cpu"), stages={})


def run(gm: fx.GraphModule, **options: Any) -> tuple[fx.GraphModule, Context]:
    context = new_context()
    return pipeline.run(gm, context, **options), context


def stage(name: str) -> tuple[fx.GraphModule, Context]:
    """Return a stage's graph with the sites that it was made from."""
    _, gm, _ = trace()
    context = new_context()
    graph = dynamo.copy_graph(gm)
    for step in pipeline.PASSES:
        graph = step.run(graph, context)
        if step.ends == name:
            break
    return graph, context


def test_the_original_graph_is_untouched() -> None:
    _, gm, _ = trace()

    def state() -> list[Any]:
        nodes = [
            (n, n.op, n.name, n.target, n.args, n.kwargs, dict(n.meta), dict(n.users))
            for n in gm.graph.nodes
        ]
        return [nodes, dict(gm.meta), gm.code]

    before = state()
    rewritten, _ = run(gm)
    assert state() == before
    assert count(rewritten, torch._C._nn.linear) == 1  # so the copy did change


def test_every_pass_is_recorded_with_what_it_changed(caplog: pytest.LogCaptureFixture) -> None:
    _, gm, _ = trace()
    with caplog.at_level(logging.DEBUG, logger="omniq"):
        _, context = run(gm)
    assert [r.name for r in context.records] == [
        "inline", "names", "inference_mode", "shards", "match", "policy", "written_weights",
        "rewrite", "share", "real_rotary", "sigmoid_gelu", "lower",
    ]  # fmt: skip
    deltas = {r.name: r.delta for r in context.records}
    assert all(deltas[name] == {} for name in ("inline", "names", "shards", "match", "policy"))
    assert deltas["real_rotary"] == deltas["sigmoid_gelu"] == {}
    assert deltas["rewrite"] == {"linear": -3, "quantize.default": 3, "gemm.default": 3}
    assert deltas["share"] == {"quantize.default": -1}
    assert deltas["lower"]["gemm.default"] == -3
    assert deltas["lower"]["quantize.default"] == -2
    assert all(r.seconds >= 0 for r in context.records)
    logged = [r.getMessage() for r in caplog.records if r.name == "omniq"]
    assert [message.split()[:2] for message in logged] == [
        ["pass", f"{record.name}:"] for record in context.records
    ]
    assert "'quantize.default': -1" in logged[8]


def test_without_share_the_numbers_are_the_same() -> None:
    model, gm, inputs = trace()
    results = []
    for skip in ((), ("share",)):
        _, context = run(gm, skip=skip)
        assert ("share" in [r.name for r in context.records]) is not bool(skip)
        assert context.stages is not None
        quantized = context.stages["quantized"]
        assert count(quantized, QUANTIZE) == (3 if skip else 2)
        results.append(quantized(*stage_inputs(quantized, gm, inputs, context)))
    for with_share, without in zip(*results, strict=True):
        assert torch.equal(with_share, without)
    x = next(i for i in inputs if i.shape == (7, 38))
    assert error(results[0][1], dequantized(x) @ dequantized(model.k.weight).T) < 5e-7


@pytest.mark.parametrize("N", [1, 19])
def test_one_column_is_laid_out_as_any_result_without_a_copy(N: int) -> None:
    w, x = torch.randn(19, 38), torch.randn(38, N)
    ((gm, inputs),) = traced(Holder(lambda x, w: w @ x, w=w), x)
    _, context = run(gm)
    assert context.stages is not None
    quantized = context.stages["quantized"]
    # Where there are more columns, the transposed product is stored in the order of the other.
    assert count(quantized, "contiguous") == (N > 1)
    (result,) = quantized(*stage_inputs(quantized, gm, inputs, context))
    assert error(result, dequantized(w) @ dequantized(x, 0)) < 5e-7


@pytest.mark.parametrize("name", ["shares", "rewrite", "lower"])
def test_only_an_optional_pass_can_be_skipped(name: str) -> None:
    _, gm, _ = trace()
    known = "Valid: share, real_rotary, sigmoid_gelu"
    with pytest.raises(OptionError, match=f"unknown optional pass '{name}'.* {known}"):
        run(gm, skip=[name])


def test_every_stage_keeps_its_promises() -> None:
    for name in legal.STAGES:
        legal.check(name, *stage(name))
    assert {promise.stage for promise in legal.PROMISES} == set(legal.STAGES)


def add_quantize(gm: fx.GraphModule) -> str:
    node = next(n for n in gm.graph.nodes if n.op == "placeholder")
    with gm.graph.inserting_after(list(gm.graph.nodes)[-2]):
        return str(gm.graph.call_function(QUANTIZE, (node, "int8")).name)


def drop_gemm(gm: fx.GraphModule) -> str:
    node = next(n for n in gm.graph.nodes if n.target is GEMM)
    name = node.meta["omniq_site"].node.name
    node.replace_all_uses_with(node.args[0].args[0])
    quantize = node.args[0]
    gm.graph.erase_node(node)
    if not quantize.users:
        gm.graph.erase_node(quantize)
    return str(name)


@pytest.mark.parametrize(
    ("name", "break_it", "words"),
    [
        ("traced", add_quantize, "no omniq operators"),
        ("quantized", drop_gemm, "every decided site is one omniq.gemm"),
        ("quantized", add_quantize, "every omniq.quantize feeds an omniq.gemm"),
        ("lowered", add_quantize, "no omniq.quantize and no omniq.gemm is left"),
    ],
)
def test_a_broken_promise_names_the_stage_and_the_node(
    name: str, break_it: Any, words: str
) -> None:
    gm, context = stage(name)
    node = break_it(gm)
    with pytest.raises(OmniqError) as caught:
        legal.check(name, gm, context)
    message = str(caught.value)
    assert f"after stage '{name}', {words} does not hold for: {node}." in message
    assert "omniq dump" in message


def test_a_graph_that_is_not_in_order_fails_the_check() -> None:
    gm, context = stage("traced")
    first = next(n for n in gm.graph.nodes if n.op == "call_function")
    first.append(next(n for n in gm.graph.nodes if n.op == "placeholder"))
    with pytest.raises(RuntimeError, match="before it has been defined"):
        legal.check("traced", gm, context)


def test_the_runner_checks_each_stage() -> None:
    _, gm, _ = trace()

    def spoil(graph: fx.GraphModule, context: Context) -> fx.GraphModule:
        graph = lower(graph, context)
        add_quantize(graph)
        return graph

    context = new_context()
    *passes, last = pipeline.PASSES
    with pytest.raises(OmniqError, match="after stage 'lowered'"):
        pipeline.run(gm, context, passes=[*passes, replace(last, run=spoil)])


def test_each_stage_is_a_copy_that_later_passes_do_not_change() -> None:
    _, gm, inputs = trace()
    _, context = run(gm)
    assert context.stages is not None
    counts = {
        name: (count(g, torch._C._nn.linear), count(g, QUANTIZE), count(g, GEMM))
        for name, g in context.stages.items()
    }
    assert counts == {"traced": (4, 0, 0), "quantized": (1, 2, 3), "lowered": (1, 0, 0)}
    for result, expected in zip(context.stages["traced"](*inputs), gm(*inputs), strict=True):
        assert torch.equal(result, expected)


def test_a_graph_without_sites_passes_through() -> None:
    ((gm, inputs),) = traced(Holder(lambda x: x * 2), torch.randn(7, 38))
    context = new_context()
    result = pipeline.run(gm, context)
    assert (context.sites, context.bindings) == ([], [])
    assert [r.delta for r in context.records] == [{}] * 12
    assert torch.equal(result(*inputs)[0], inputs[0] * 2)
