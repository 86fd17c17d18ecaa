"""Linears of distributed tensors: tensor parallelism, one process at a time.

Each test plays one process of two by a backend whose collectives do nothing; what the processes
would sum is summed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import OPTIONS, Holder, compiled, count, dequantized, error, run, traced
from torch import distributed, nn
from torch._dynamo.exc import BackendCompilerFailed

import omniq_compile
from omniq_compile import QuantConfig
from omniq_compile.lowering.target import detect
from omniq_compile.memory import state_bytes
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context
from omniq_compile.passes.rewrite import GEMM, QUANTIZE
from omniq_compile.passes.sites import Site

tensor = pytest.importorskip("torch.distributed.tensor")
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

PROCESSES = 2
M, K, N = 9, 70, 46
STYLES: dict[str, Any] = {"columns": ColwiseParallel, "rows": RowwiseParallel}


@contextmanager
def process(rank: int) -> Iterator[Any]:
    """Be one of the processes; gives their mesh."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=PROCESSES)
    try:
        yield distributed.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    finally:
        distributed.destroy_process_group()


@pytest.fixture
def mesh() -> Iterator[Any]:
    with process(0) as found:
        yield found


def sharded(model: nn.Module, mesh: Any, **styles: str) -> Any:
    plan = {name: STYLES[style]() for name, style in styles.items()}
    return parallelize_module(model, mesh, plan, src_data_rank=None)


class Mlp(nn.Module):
    """A gated MLP, whose two first layers have one input."""

    def __init__(self, hidden: int = 92) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(K, hidden), nn.Linear(K, hidden)
        self.down = nn.Linear(hidden, N)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.nn.functional.gelu(self.up(x)) * self.gate(x))


def sharded_mlp(mesh: Any) -> Any:
    return sharded(Mlp(), mesh, up="columns", gate="columns", down="rows")


def part(whole: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    return whole.chunk(PROCESSES, axis)[rank].contiguous()


def reasons(sites: list[Site]) -> list[str | None]:
    return [None if site.decision.method else site.decision.reason for site in sites]


METHODS: list[dict[str, Any]] = [
    {"method": "int8"},
    {"method": "fp8"},
    {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0},
]

LOOSE = {"int8": 0.015, "fp8": 0.05, "mxfp4_dualscale": 0.2}


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"])
@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_each_process_multiplies_its_part(style: str, options: dict[str, Any]) -> None:
    layer, x = nn.Linear(K, N).requires_grad_(False), torch.randn(M, K)
    expected = layer(x).double()
    rows = style == "rows"
    results = []
    for rank in range(PROCESSES):
        own = nn.Linear(K // 2, N) if rows else nn.Linear(K, N // 2)
        own.weight.copy_(part(layer.weight, rank, 1 if rows else 0))
        own.bias.copy_(layer.bias / 2 if rows else part(layer.bias, rank, 0))
        given = part(x, rank, 1) if rows else x
        with process(rank) as mesh:
            model = nn.Sequential(nn.Linear(K, N))
            model.load_state_dict({"0.weight": layer.weight, "0.bias": layer.bias})
            result, sites = run(sharded(model, mesh, **{"0": style}), given, **options)
        assert reasons(sites) == [None]
        assert torch.equal(result, compiled(own.requires_grad_(False), **options)(given))
        if options["method"] == "int8":
            tight = dequantized(given) @ dequantized(own.weight).T + own.bias
            assert error(result, tight) < 1e-6
        results.append(result)
    whole = sum(results) if rows else torch.cat(results, -1)
    assert 0 < error(whole, expected) < LOOSE[options["method"]]


def test_a_report_names_the_layers(mesh: Any) -> None:
    options = {"method": "int8", "min_features": 1, "ignored_layers": ["gate"]}
    sites = omniq_compile.explain(sharded_mlp(mesh), [torch.randn(M, K)], options).sites
    assert [(site.layer, site.decision.method) for site in sites] == [
        ("up", "int8"), ("gate", None), ("down", "int8"),
    ]  # fmt: skip
    assert (sites[0].N, sites[2].K) == (46, 46)


# Before torch 2.12 Dynamo hides what a `DTensor` is made of in a function of its own.
@pytest.mark.skipif(torch.__version__ < "2.12", reason="the tensor behind a DTensor is not seen")
def test_layers_with_one_input_quantize_it_once(mesh: Any) -> None:
    config = QuantConfig.from_options(OPTIONS)
    context = Context(config, detect("cpu"), stages={})
    ((gm, _),) = traced(sharded_mlp(mesh), torch.randn(M, K))
    pipeline.run(gm, context)
    assert count(context.stages["quantized"], QUANTIZE) == 2
    assert count(context.stages["quantized"], GEMM) == 3


@torch.no_grad()
def test_kept_layers_give_the_numbers_of_before(mesh: Any) -> None:
    model, x = sharded_mlp(mesh), torch.randn(2, M, K)
    expected = model(x)
    result, sites = run(model, x, ignored_layers=["re:.*"])
    assert len(sites) == 3
    assert torch.equal(result, expected)


@torch.no_grad()
def test_a_changed_part_is_quantized_anew(mesh: Any) -> None:
    model, x = sharded_mlp(mesh), torch.randn(M, K)
    fast = compiled(model)
    before = fast(x)
    model.down.weight.to_local().mul_(2)
    model.down.bias.to_local().mul_(2)
    assert error(fast(x), 2 * before) < 1e-6


@torch.no_grad()
def test_a_split_batch_is_multiplied_by_a_whole_weight(mesh: Any) -> None:
    layer = nn.Linear(K, N).requires_grad_(False)
    own = torch.randn(4, M, K)
    given = tensor.DTensor.from_local(own, mesh, [tensor.Shard(0)])

    def call(x: Any, weight: Any, bias: Any) -> Any:
        return nn.functional.linear(x, weight, bias)

    whole = [
        nn.Parameter(tensor.DTensor.from_local(t, mesh, [tensor.Replicate()]), requires_grad=False)
        for t in (layer.weight.detach(), layer.bias.detach())
    ]
    result, sites = run(call, given, *whole)
    assert reasons(sites) == [None]
    assert result.shape == (4 * PROCESSES, M, N)
    assert (
        error(result.to_local(), dequantized(own) @ dequantized(layer.weight).T + layer.bias) < 1e-6
    )


@torch.no_grad()
def test_a_linear_reads_the_distributed_result_of_another(mesh: Any) -> None:
    own = torch.randn(M, K), torch.randn(46, K), torch.randn(N, 46)
    placements = tensor.Replicate(), tensor.Shard(0), tensor.Shard(1)
    x, *weights = (
        tensor.DTensor.from_local(part, mesh, [placement])
        for part, placement in zip(own, placements, strict=True)
    )
    linear = nn.functional.linear
    model = Holder(lambda x, up, down: linear(linear(x, up), down), up=weights[0], down=weights[1])
    result, sites = run(model, x)
    assert reasons(sites) == [None, None]
    assert 0 < error(result.to_local(), linear(linear(own[0], own[1]), own[2])) < 0.03


# The first has 23 and 22 rows; to multiply in the second, `DTensor` gathers the batch first.
@pytest.mark.parametrize("near_miss", ["uneven", "split batch"])
@torch.no_grad()
def test_what_is_no_product_of_parts_is_kept(near_miss: str, mesh: Any) -> None:
    rows = 23 if near_miss == "uneven" else 24
    weight = nn.Parameter(
        tensor.DTensor.from_local(
            torch.randn(rows, K), mesh, [tensor.Shard(0)],
            shape=torch.Size([45 if near_miss == "uneven" else 48, K]), stride=(K, 1),
        ),
        requires_grad=False,
    )  # fmt: skip
    placement = tensor.Replicate() if near_miss == "uneven" else tensor.Shard(0)
    x = tensor.DTensor.from_local(torch.randn(M, K), mesh, [placement])
    _, sites = run(lambda x, weight: nn.functional.linear(x, weight), x, weight)
    assert reasons(sites) == ["it multiplies a DTensor and a DTensor"]


@torch.no_grad()
def test_a_whole_bias_beside_parts_of_a_weight_is_left_to_its_own_rules(mesh: Any) -> None:
    given = (torch.randn(M, K), tensor.Replicate()), (torch.randn(23, K), tensor.Shard(0))
    x, weight, bias = (
        tensor.DTensor.from_local(own, mesh, [placement])
        for own, placement in (*given, (torch.randn(46), tensor.Replicate()))
    )
    model = Holder(nn.functional.linear, weight=weight, bias=bias)
    result, sites = run(model, x)
    assert reasons(sites) == ["it multiplies a DTensor and a DTensor"]
    assert torch.equal(result.to_local(), model(x).to_local())


@torch.no_grad()
def test_a_part_of_a_computed_weight_is_computed_in_each_call(mesh: Any) -> None:
    """What computes with a DTensor may wait for other processes, as no weight is made."""
    weight = tensor.DTensor.from_local(torch.randn(23, K), mesh, [tensor.Shard(0)])

    def function(x: torch.Tensor, weight: Any) -> torch.Tensor:
        return nn.functional.linear(x, (weight * 2).to_local())

    model, x = Holder(function, weight=weight), torch.randn(M, K)
    result, sites = run(model, x)
    assert [reason.partition(" (")[0] for reason in reasons(sites)] == [
        "its weight is computed in the graph"
    ]
    assert torch.equal(result, model(x))


@torch.no_grad()
def test_what_autocast_casts_is_kept(mesh: Any) -> None:
    model, x = sharded_mlp(mesh), torch.randn(M, K)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        result, sites = run(model, x)
    assert reasons(sites) == ["it multiplies a DTensor and a DTensor"] * 3
    assert torch.equal(result, expected)


def test_gradients_that_a_model_takes_itself_are_not_cut_off(mesh: Any) -> None:
    model = sharded_mlp(mesh)

    def force(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            given = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(model(given).sum(), given)
        return gradient

    x = torch.randn(M, K)
    with torch.no_grad():
        if torch.__version__ >= "2.15":  # whose Dynamo traces the model with gradients on
            with pytest.raises(BackendCompilerFailed, match="omniq is for inference"):
                run(force, x)
        else:
            assert error(run(force, x)[0], force(x)) < 1e-6


def test_the_bytes_of_a_model_are_those_of_its_parts(mesh: Any) -> None:
    halves = (K * 46 + 46) * 2 + 46 * N  # up, gate and down are split, down's bias is whole
    assert state_bytes(sharded_mlp(mesh)) == 4 * (halves + N)


def test_inductor_compiles_it(mesh: Any) -> None:
    model, x = sharded_mlp(mesh), torch.randn(M, K)
    with torch.no_grad():
        expected = compiled(model)(x)
        torch._dynamo.reset()
        assert error(compiled(model, compiler="inductor")(x), expected) < 1e-3


def test_a_part_of_a_weight_is_not_stored_as_codes(mesh: Any) -> None:
    model = nn.Sequential(nn.Linear(K, K), sharded_mlp(mesh)).requires_grad_(False)
    rows = omniq_compile.quantize_(model, {"method": "int8", "min_features": 1})
    assert [row.method for row in rows] == ["int8", None, None, None]
    assert {row.reason for row in rows[1:]} == {
        "its weight is a DTensor, whose values other tensors hold"
    }
    with pytest.raises(omniq_compile.WeightError, match="DTensor"):
        omniq_compile.quantize(model[1].up.weight, "int8")
