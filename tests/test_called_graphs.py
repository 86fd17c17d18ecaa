"""Graphs that a graph calls: marked regions and checkpoints are rewritten, branches are listed."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from conftest import run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import omniq_compile
from omniq_compile.passes.inline import inline

WIDTH = 64
OPTIONS = {"method": "int8", "min_features": 1, "compiler": "eager"}


class Block(nn.Module):
    """Two layers with an activation product between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        return x + self.down(torch.softmax(hidden @ hidden.mT, dim=-1) @ hidden)


class Region(Block):
    """The same, compiled once for all of its class."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class RegionOfRegions(Region):
    """A region that calls one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Region()

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(x)[..., :WIDTH]


class Checkpointed(Block):
    """The same, whose activations a backward pass would compute again."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Model(nn.Module):
    """Three blocks in a row, as many sites as they have."""

    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind() for _ in range(3))
        self.requires_grad_(False).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _input(rows: int = 9) -> Tensor:
    return torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()


def _compiled(model: nn.Module, options: dict, **arguments: object) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="omniq", options=OPTIONS | options, **arguments)


def _found(model: nn.Module, options: dict) -> list[tuple[str, str | None]]:
    report = omniq_compile.explain(model, _input(), OPTIONS | options)
    return [(site.layer, site.decision.method) for site in report.sites]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Checkpointed, {}),
        (Region, {}),
        (Region, {"matmul": True}),
        (Region, {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1}),
        (Region, {"ignored_layers": ["blocks.1.up"]}),
    ],
    ids=["checkpointed", "region", "matmul", "leading", "ignored"],
)
def test_a_called_graph_is_rewritten_as_if_it_stood_there(kind, options):
    """By names, decisions and numbers: each call its own block's weights."""
    plain, called = Model(Block), Model(kind)
    assert all((called.state_dict()[name] == t).all() for name, t in plain.state_dict().items())
    assert _found(called, options) == _found(plain, options)
    assert any(method for _, method in _found(called, options))
    with torch.no_grad():
        want = _compiled(plain, options)(_input())
        assert torch.equal(_compiled(called, options, fullgraph=True)(_input()), want)


class Inside(nn.Module):
    """A model in another module, which no region is in."""

    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        self.inner = Model(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_the_modules_around_a_region_stay_where_they_are():
    _, found = run(Inside(Region), _input())
    around = [[link.name for link in site.around][:2] for site in found]
    assert around == [["inner", f"inner.blocks.{i}"] for i in range(3) for _ in range(4)]


class SharedFirst(Block):
    """A layer that all blocks have before their own."""

    first: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


class RegionOfSharedFirst(SharedFirst):
    """The same, a region whose first weight is that of every call."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_region_with_a_weight_of_all_calls_is_named_by_those_of_its_own():
    found = []
    for kind in (SharedFirst, RegionOfSharedFirst):
        model = Model(kind)
        first = nn.Linear(WIDTH, WIDTH).requires_grad_(False).bfloat16()
        for block in model.blocks:
            block.first = first
        found.append(_found(model, {"ignored_layers": ["blocks.1.up"]}))
    assert found[0] == found[1]
    assert [layer for layer, method in found[0] if layer.endswith(".up") and method] == [
        "blocks.0.up",
        "blocks.2.up",
    ]


def test_a_region_in_a_region_and_any_number_of_rows():
    """Named as the block that calls it, with sizes that become symbols."""
    model = Model(RegionOfRegions)
    names = [layer for layer, _ in _found(model, {})]
    inner = ["inner.up", "inner", "inner", "inner.down"]
    assert names == [f"blocks.{i}.{name}" for i in range(3) for name in (*inner, "up")]
    compiled = _compiled(model, {}, fullgraph=True)
    for rows in (9, 5, 17):
        with torch.no_grad():
            want = model(_input(rows)).float()
            error = (compiled(_input(rows)).float() - want).norm() / want.norm()
        assert 0 < error < 0.02


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="before 2.13 Dynamo takes no tensor subclass in a region"
)
def test_stored_weights_of_regions():
    """Quantized in place, they multiply as the same weights that are quantized at the call."""
    model = Model(Region)
    stored = copy.deepcopy(model)
    omniq_compile.quantize_(stored, {"method": "int8", "min_features": 1})
    with torch.no_grad():
        want = _compiled(model, {})(_input())
        assert torch.equal(_compiled(stored, {}, fullgraph=True)(_input()), want)


class Branches(nn.Module):
    """A layer after one of two others, whose weights are layers' and a parameter's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positive = Block()
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.after = nn.Linear(WIDTH, WIDTH)
        self.requires_grad_(False).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cond(x.sum() > 0, self.positive, lambda y: y @ self.table, (x,)))


def test_products_of_branches_are_listed_and_kept():
    """They are in no graph that omniq rewrites, and the report says so."""
    model = Branches()
    report = omniq_compile.explain(model, _input(), OPTIONS)
    inside = [site for site in report.sites if "cond" in site.decision.reason]
    assert [(site.layer, site.kind) for site in inside] == [
        ("positive.up", "weight x activation"),
        ("positive", "activation x activation"),
        ("positive", "activation x activation"),
        ("positive.down", "weight x activation"),
        ("table", "weight x activation"),
    ]
    assert [site.layer for site in report.rewritten] == ["after"]
    assert report.sites == [*inside, *report.rewritten]


def test_branches_run_beside_a_rewritten_layer():
    """Both of them, with the numbers that they have without omniq."""
    model = Branches()
    compiled = _compiled(model, {}, fullgraph=True)
    for x in (_input().abs(), -_input().abs()):
        with torch.no_grad():
            want = model(x).float()
            error = (compiled(x).float() - want).norm() / want.norm()
        assert 0 < error < 0.02


class WritingBranches(Branches):
    """One branch writes to a copy of a layer's weight, the other reads it."""

    def forward(self, x: Tensor) -> Tensor:
        def write(y: Tensor) -> Tensor:
            return y @ self.positive.up.weight.clone().mul_(2).t()[:, :WIDTH]

        return self.after(torch.cond(x.sum() > 0, write, lambda y: y @ self.table, (x,)))


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="before 2.12 Dynamo takes no tensor subclass in a branch"
)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [Branches, WritingBranches])
def test_branches_get_the_values_of_stored_weights(kind, compiler: str):
    """PyTorch has no rule for tensor subclasses there. What is only read keeps its bits."""
    model = kind()
    want = {}
    for sign in (1, -1):
        with torch.no_grad():
            want[sign] = model(_input().abs() * sign).float()
    omniq_compile.quantize_(model, OPTIONS)
    parts = [part.clone() for part in model.positive.up.weight.parts]
    compiled = _compiled(model, {"compiler": compiler}, fullgraph=True)
    for sign in (1, -1, 1):
        with torch.no_grad():
            found = compiled(_input().abs() * sign).float()
        assert 0 < (found - want[sign]).norm() / want[sign].norm() < 0.02
    stored = model.positive.up.weight.parts
    if kind is Branches:
        assert all(map(torch.equal, stored, parts))


class ReadBefore(Branches):
    """The branches read a weight that a product before them has read."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(x)
        return torch.cond(x.sum() > 0, self.after, lambda y: self.after(y) * 2, (x,))


class WrittenBehind(Branches):
    """A weight is read, and written to behind a call of graphs that others are attributes of."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(x)
        x = torch.cond(x.sum() > 0, self.positive, lambda y: y @ self.table, (x,))
        self.after.weight.mul_(0.5)
        return self.after(x)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="before 2.12 Dynamo takes no tensor subclass in a branch"
)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [ReadBefore, WrittenBehind])
def test_stored_weights_have_their_values_before_the_first_who_reads_them(kind, compiler: str):
    model = kind()
    plain = copy.deepcopy(model)
    omniq_compile.quantize_(model, OPTIONS)
    compiled = _compiled(model, {"compiler": compiler}, fullgraph=True)
    for sign in (1, -1):
        x = _input().abs() * sign
        with torch.no_grad():
            found, want = compiled(x).float(), plain(x).float()
        assert 0 < (found - want).norm() / want.norm() < 0.02


@torch.compiler.nested_compile_region
def _halved(x, state):
    y = torch.nn.functional.linear(x, state)
    # Of no list of views: that it lies in the memory of `state` is all there is to know of it.
    state.unfold(0, 2, 2).mul_(0.5)
    return y + torch.nn.functional.linear(x, state)


class Halved(nn.Module):
    """One region of two buffers, which it writes to through a view."""

    def __init__(self):
        super().__init__()
        for name in ("a", "b"):
            self.register_buffer(name, torch.randn(64, 64))

    def forward(self, x):
        return _halved(x, self.a), _halved(x, self.b)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_what_a_region_writes_to_is_that_of_each_call(compiler: str):
    model, x = Halved(), torch.randn(5, 64)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        results = _compiled(model, {"compiler": compiler})(x)
        for result, expected in zip(results, plain(x), strict=True):
            torch.testing.assert_close(result, expected)
    torch.testing.assert_close(model.b, plain.b)


def test_attributes_of_two_called_graphs_may_have_one_name():
    """Dynamo numbers those that it makes; a graph made otherwise may not."""

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.register_buffer("factor", torch.tensor(factor))

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * self.factor,)

    outer = torch.fx.Graph()
    holder = nn.Module()
    x, results = outer.placeholder("x"), []
    for name, factor in (("first", 3.0), ("second", 5.0)):
        setattr(holder, name, torch.fx.symbolic_trace(Scaled(factor)))
        called = (outer.get_attr(name), x)
        call = outer.call_function(torch.ops.higher_order.tag_activation_checkpoint, called)
        results.append(outer.call_function(operator.getitem, (call, 0)))
    outer.output(tuple(results))
    gm = inline(torch.fx.GraphModule(holder, outer))
    gm.recompile()
    given = torch.randn(4)
    assert all(map(torch.equal, gm(given), (given * 3, given * 5)))
