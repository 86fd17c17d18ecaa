"""A weight that is a view, slice or concatenation of parameters is quantized once, outside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS, Holder, compiled, count, dequantized, error, run, sites
from torch import fx

from omniq_compile import QuantConfig
from omniq_compile.backend import omniq
from omniq_compile.lowering.target import detect
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context
from omniq_compile.passes.metadata import fake_mode
from omniq_compile.passes.rewrite import GEMM, QUANTIZE
from omniq_compile.passes.sites import Kind

Tensors = Callable[..., torch.Tensor]

# name: what makes the weight [N, 38] of p [57, 38] and q [19, 38]
MOVES: dict[str, Tensors] = {
    "slice_rows": lambda p, q: p[19:38],
    "slice_columns_step": lambda p, q: p.T[:, ::3].T,
    "slice_back": lambda p, q: p[-19:, :],
    "narrow": lambda p, q: p.narrow(0, 3, 19),
    "torch_narrow": lambda p, q: torch.narrow(p, 0, 3, 19),
    "chunk": lambda p, q: p.chunk(3)[1],
    "torch_chunk": lambda p, q: torch.chunk(p, 3, dim=0)[2],
    "split": lambda p, q: p.split([20, 37])[1],
    "torch_split": lambda p, q: torch.split(p, 19)[0],
    "view": lambda p, q: p.view(3, 19, 38)[0],
    "reshape": lambda p, q: p.reshape(38, 57).reshape(57, 38),
    "unflatten_unbind": lambda p, q: p.unflatten(0, (3, 19)).unbind(0)[2],
    "select": lambda p, q: p.unflatten(0, (3, 19)).select(0, 1),
    "transpose_twice": lambda p, q: p.transpose(0, 1).contiguous().t(),
    "permute": lambda p, q: p.view(57, 2, 19).permute(0, 2, 1).flatten(1),
    "property_T": lambda p, q: p.T.mT,
    "cat": lambda p, q: torch.cat([p, q]),
    "cat_of_itself": lambda p, q: torch.cat([q, q], dim=0),
    "cat_keyword": lambda p, q: torch.cat(tensors=(q, p), dim=0),
    "stack": lambda p, q: torch.stack([q, q]).flatten(0, 1),
    "squeeze": lambda p, q: q.unsqueeze(0).squeeze(0),
    "clone": lambda p, q: q.clone().detach(),
    "cast": lambda p, q: q.to(torch.float32).float(),
    "cast_like": lambda p, q: q.double().to(p),
    "cast_to_type": lambda p, q: q.double().type(torch.float32),
    "cast_to_named_type": lambda p, q: q.double().type("torch.FloatTensor"),
    "data": lambda p, q: q.data,
    "data_of_slice": lambda p, q: p[:20].data.T.data.T,
    "movedim": lambda p, q: q.movedim(0, 1).swapdims(0, 1),
    "torch_moveaxis": lambda p, q: torch.swapdims(torch.moveaxis(q, 0, 1), 0, 1),
    "flip": lambda p, q: q.flip(0),
    "torch_flip": lambda p, q: torch.flip(q, dims=[0]).fliplr().flipud(),
    "roll": lambda p, q: torch.roll(q.roll(1, 0), 5, dims=1),
    "rot90": lambda p, q: torch.rot90(q, 2),
    "repeat": lambda p, q: q.repeat(2, 1),
    "tile": lambda p, q: torch.tile(q.tile((2, 1)), (2, 1)),
    "repeat_interleave": lambda p, q: q.repeat_interleave(2, 0),
    "torch_repeat_interleave": lambda p, q: torch.repeat_interleave(q, repeats=2, dim=0),
    "pad": lambda p, q: F.pad(q, (0, 0, 2, 3), value=0.5),
    "tensor_split": lambda p, q: torch.tensor_split(p.tensor_split(2)[0], 2)[1],
    "vsplit": lambda p, q: torch.vsplit(p.vsplit(3)[1], 1)[0],
    "hsplit": lambda p, q: torch.hstack(torch.hsplit(p, 2)[::-1]),
    "vstack": lambda p, q: torch.vstack([p, q]),
    "concatenate": lambda p, q: torch.concatenate([p, q]),
    "ravel": lambda p, q: torch.ravel(q.ravel()).view(19, 38),
    "adjoint": lambda p, q: torch.adjoint(q.adjoint()).H.mH,
    "atleast_2d": lambda p, q: torch.atleast_2d(q[0]),
    "permute_copy": lambda p, q: torch.transpose_copy(torch.permute_copy(q, (1, 0)), 0, 1),
    "narrow_copy": lambda p, q: torch.narrow_copy(p, 0, 3, 19),
    "dropout_in_eval": lambda p, q: torch.dropout(F.dropout(q, 0.5, False), 0.5, False),
    "dropout_of_none": lambda p, q: F.dropout(q, 0.0),
    "unsafe_chunk": lambda p, q: torch.unsafe_chunk(p.unsafe_chunk(3)[1], 1)[0],
    "unsafe_split": lambda p, q: p.unsafe_split(20)[1].unsafe_split_with_sizes([10, 10])[1],
    "split_with_sizes": lambda p, q: torch.split_with_sizes(p, [20, 37])[1],
    "view_as": lambda p, q: q.view_as(q).reshape_as(q).expand_as(q),
    "broadcast_to": lambda p, q: torch.broadcast_to(q[:1], (5, 38)),
    "diagonal": lambda p, q: p.view(19, 3, 38).diagonal(0, 1, 2).T.repeat(1, 13)[:, :38],
    "positive": lambda p, q: torch.positive(+q),
    "as_tensor": lambda p, q: torch.asarray(torch.as_tensor(q, dtype=p.dtype, device="cpu")),
}  # fmt: skip


def parameters() -> dict[str, torch.Tensor]:
    return {"p": torch.randn(57, 38), "q": torch.randn(19, 38)}


def quantized(model: Holder, *inputs: torch.Tensor) -> tuple[Any, fx.GraphModule]:
    """Return the result of a compiled call, and the graph before it is lowered."""
    context = Context(QuantConfig.from_options(OPTIONS), detect("cpu"), stages={})

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        pipeline.run(gm, context)
        return omniq(gm, example_inputs, options=OPTIONS)

    result = torch.compile(model, backend=backend)(*inputs)
    assert context.stages is not None
    return result, context.stages["quantized"]


@pytest.mark.parametrize("name", MOVES)
def test_a_moved_parameter_is_a_weight_and_leaves_nothing_in_the_graph(name: str) -> None:
    weight = MOVES[name]
    model = Holder(lambda x, p, q: F.linear(x, weight(p, q)), **parameters())
    x = torch.randn(7, 38)

    result, gm = quantized(model, x)
    operations = [n.target for n in gm.graph.nodes if n.op.startswith("call")]
    assert operations == [QUANTIZE, GEMM]
    assert sum(n.op == "placeholder" for n in gm.graph.nodes) == 3  # x, codes and scale

    exact = dequantized(x) @ dequantized(weight(model.p, model.q)).T
    assert error(result, exact) < 5e-7


def test_a_buffer_is_a_weight() -> None:
    model = Holder(F.linear, buffers=True, w=torch.randn(19, 38))
    x = torch.randn(7, 38)
    result, (site,) = run(model, x)
    assert (site.kind, site.decision.method) == (Kind.WEIGHT, "int8")
    assert error(result, dequantized(x) @ dequantized(model.w).T) < 5e-7


def test_a_plain_tensor_attribute_is_no_weight() -> None:
    model = Holder(lambda x: F.linear(x, model.w))
    model.w = torch.randn(19, 38)
    x = torch.randn(7, 38)
    (site,) = sites(model, x)
    assert (site.kind, site.decision.method) == ("activation x activation", None)


def test_a_weight_that_other_nodes_use_too_stays_an_input() -> None:
    model = Holder(lambda x, w: (F.linear(x, w), w.sum(0)), w=torch.randn(19, 38))
    x = torch.randn(7, 38)
    (product, total), gm = quantized(model, x)
    assert count(gm, GEMM) == 1
    assert sum(n.op == "placeholder" for n in gm.graph.nodes) == 4
    assert error(product, dequantized(x) @ dequantized(model.w).T) < 5e-7
    assert torch.equal(total, model.w.sum(0))


def test_two_slices_of_one_parameter_are_two_weights() -> None:
    model = Holder(lambda x, p, q: (F.linear(x, p[:20]), F.linear(x, p[20:])), **parameters())
    x = torch.randn(7, 38)
    (first, second), sites = run(model, x)
    assert [site.problem.N for site in sites if site.problem] == [20, 37]
    exact = dequantized(x) @ dequantized(model.p).T
    assert error(first, exact[:, :20]) < 5e-7
    assert error(second, exact[:, 20:]) < 5e-7


def test_a_weight_selected_by_an_input_is_not_one_weight() -> None:
    model = Holder(lambda x, i, w: x @ w[i], w=torch.randn(3, 38, 19))
    x, index = torch.randn(7, 38), torch.tensor(2)
    (site,) = sites(model, x, index)
    assert (site.kind, site.decision.method) == ("activation x activation", None)
    call = compiled(model)
    for i in range(3):
        assert torch.equal(call(x, torch.tensor(i)), x @ model.w[i])


def test_a_weight_may_be_moved_more_often_than_python_recurses() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(1001):
            w = w.t()
        return x @ w

    model = Holder(function, w=torch.randn(19, 38))
    x = torch.randn(7, 38)
    result, (site,) = run(model, x)
    assert (site.kind, site.decision.method) == (Kind.WEIGHT, "int8")
    assert error(result, dequantized(x) @ dequantized(model.w).T) < 5e-7


def test_a_parameter_is_read_once_however_many_ways_lead_to_it() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(40):  # 2**40 ways
            upper, lower = w.chunk(2)
            w = torch.cat([lower, upper])
        return F.linear(x, w)

    model = Holder(function, w=torch.randn(20, 38))
    x = torch.randn(7, 38)
    result, (site,) = run(model, x)
    assert (site.kind, site.decision.method) == (Kind.WEIGHT, "int8")
    assert error(result, dequantized(x) @ dequantized(model.w).T) < 5e-7


# name: a weight that depends on more than parameters, or is more than functions of them
COMPUTED: dict[str, Tensors] = {
    "by_activation": lambda x, w: w + x[:1],
    "scaled_by_activation": lambda x, w: w * x.mean(),
    "normalised": lambda x, w: F.normalize(w * x[0], dim=1),
    "ranked": lambda x, w: w.cumsum(0),
    "chosen_by_activation": lambda x, w: w[x[0, :19].argsort()],
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("matmul", [False, True])
def test_a_weight_computed_in_the_graph_is_an_activation(name: str, matmul: bool) -> None:
    weight = COMPUTED[name]

    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight(x, w), bias=b)

    model = Holder(function, w=torch.randn(19, 38), b=torch.randn(19))
    x = torch.randn(7, 38)
    result, (site,) = run(model, x, matmul=matmul)
    if matmul:
        assert site.decision.method == "int8"
        exact = dequantized(x) @ dequantized(weight(x, model.w)).T + model.b.double()
        assert error(result, exact) < 5e-7
    else:
        assert site.decision.reason.startswith("its weight is computed in the graph")
        assert torch.equal(result, model(x))


# name: a write, during the call, to memory that the weight w reads
WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "method": lambda w: w.mul_(1.5),
    "operator": lambda w: w.__imul__(1.5),
    "set_item": lambda w: w.__setitem__(0, 9.0),
    "slice": lambda w: w[3:5].fill_(9.0),
    "transpose": lambda w: w.T.add_(1.0),
    "data": lambda w: w.data.add_(1.0),
    "detached": lambda w: w.detach().add_(1.0),
    "diagonal": lambda w: w.diagonal().fill_(9.0),
    "view_as": lambda w: w.view_as(w).add_(1.0),
    "as_strided": lambda w: torch.as_strided(w, (2, 3), (1, 1)).fill_(9.0),
    "tensor_split": lambda w: w.tensor_split(3)[1].fill_(9.0),
    "out": lambda w: torch.mul(w, 1.5, out=w),
    "out_position": lambda w: F.normalize(w, 2.0, -1, 1e-12, w),
    "embedding": lambda w: F.embedding(torch.arange(5), w, max_norm=1.0),
    "in_place_argument": lambda w: F.relu(w, inplace=True),
    "in_place_position": lambda w: F.relu(w, True),
    "foreach": lambda w: torch._foreach_mul_([w], 1.5),
    "overload": lambda w: torch.ops.aten.mul_.Scalar(w, 1.5),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_weight_that_the_graph_writes_to_is_kept(name: str) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        WRITES[name](w)
        return F.linear(x, w[:17])

    model = Holder(function, buffers=True, w=torch.randn(19, 38))
    x = torch.randn(7, 38)
    eager, before = copy.deepcopy(model), model.w.clone()
    result, (site,) = run(model, x)
    assert site.decision.reason == "the graph changes its weight in place"
    assert torch.equal(result, eager(x))
    assert torch.equal(model.w, eager.w)
    assert not torch.equal(model.w, before)


def test_a_clone_that_the_graph_writes_to_is_kept() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        doubled = w.clone()
        doubled.diagonal().mul_(2)
        return F.linear(x, doubled)

    model = Holder(function, w=torch.randn(19, 38))
    x, before = torch.randn(7, 38), model.w.clone()
    result, (site,) = run(model, x)
    assert site.decision.reason == "the graph changes its weight in place"
    assert torch.equal(result, model(x))
    assert torch.equal(model.w, before)


# name: near misses, which read the weight and write elsewhere
READS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "cast": lambda x, w: w.double(),
    "view": lambda x, w: w.diagonal().sum(),
    "write_to_a_sum": lambda x, w: w.sum(0).add_(1),
    "write_to_activation": lambda x, w: x.clone().add_(1),
    "relu_out_of_place": lambda x, w: F.relu(w, inplace=False),
    "overload": lambda x, w: torch.ops.aten.mul.Scalar(w, 2.0),
}


@pytest.mark.parametrize("name", READS)
def test_a_weight_that_the_graph_only_reads_is_rewritten(name: str) -> None:
    model = Holder(lambda x, w: (READS[name](x, w), F.linear(x, w)), w=torch.randn(19, 38))
    x = torch.randn(7, 38)
    (_, result), (site,) = run(model, x)
    assert site.decision.method == "int8"
    assert error(result, dequantized(x) @ dequantized(model.w).T) < 5e-7


def test_without_fake_tensors_there_is_no_mode_to_enter() -> None:
    with torch.enable_grad(), fake_mode((torch.ones(1), 2)):
        assert torch.is_grad_enabled()
