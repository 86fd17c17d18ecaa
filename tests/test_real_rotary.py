"""Rotary embeddings by complex numbers are computed with real ones, and give the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import compiled, count, error, traced
from generated_cuda import interpret, interpreted, make
from torch import fx, nn

from omniq_compile import QuantConfig
from omniq_compile.inspector import absent_gpu, generated
from omniq_compile.lowering.target import Target
from omniq_compile.models.random_models import make_inputs, random_model
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context

CPU = Target("cpu", "generic")


def lowered(gm: fx.GraphModule, target: Target = CPU, skip: tuple[str, ...] = ()) -> fx.GraphModule:
    config = QuantConfig.from_options({"method": "int8", "min_features": 1})
    return pipeline.run(gm, Context(config, target), skip=skip)


def counts(model: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """Return how many products of complex numbers a call has, and how many of them are left."""
    before = [gm for gm, _ in traced(model, *args, **kwargs)]
    after = [lowered(gm) for gm in before]
    found, left = (sum(map(complex_products, graphs)) for graphs in (before, after))
    stacked = [sum(count(gm, torch.stack) for gm in graphs) for graphs in (before, after)]
    assert stacked[1] - stacked[0] == found - left
    if not left:
        assert not any(count(gm, torch.view_as_complex) for gm in after)
    return found, left


def complex_products(gm: fx.GraphModule) -> int:
    return sum(
        getattr(node.target, "__name__", node.target) in ("mul", "mul.Tensor")
        and node.meta["example_value"].is_complex()
        for node in gm.graph.nodes
    )


def rotate(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """As the models of diffusers have it: x is ``[..., D]``, frequencies ``[..., D / 2]``."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * frequencies).flatten(-2).type_as(x)


def exact(x: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same by numpy in double precision, and the sum of its terms' magnitudes."""
    pairs = x.double().unflatten(-1, (x.shape[-1] // 2, 2)).numpy()
    a, b = pairs[..., 0] + 1j * pairs[..., 1], frequencies.numpy().astype(numpy.complex128)
    product = a * b
    magnitude = (
        abs(a.real * b.real) + abs(a.imag * b.imag),
        abs(a.real * b.imag) + abs(a.imag * b.real),
    )
    both = [numpy.stack(parts, -1) for parts in ((product.real, product.imag), magnitude)]
    result, sizes = (torch.from_numpy(t).flatten(-2) for t in both)
    return result, sizes


def check(out: torch.Tensor, x: torch.Tensor, frequencies: torch.Tensor) -> None:
    expected, magnitude = exact(x, frequencies)
    assert out.shape == expected.shape
    # Each product and their sum are rounded to float32.
    assert bool(((out.double() - expected).abs() <= 2**-23 * magnitude).all())


def unit(*shape: int) -> torch.Tensor:
    return torch.polar(torch.rand(shape) + 0.5, 7 * torch.randn(shape))


class Block(nn.Module):
    """A norm, rotary embeddings, and the concatenation of two streams, as in Qwen-Image."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, f: torch.Tensor, g: torch.Tensor
    ) -> torch.Tensor:
        both = [(x, f), (y, g)]
        return torch.cat([rotate(self.norm(t), u.unsqueeze(1)) for t, u in both], dim=1)

    def inputs(self) -> list[torch.Tensor]:
        x, y = (torch.randn(1, tokens, 2, 32).bfloat16() for tokens in (19, 7))
        return [x, y, unit(19, 16), unit(7, 16)]


@pytest.mark.parametrize(
    ("class_name", "preset", "products"),
    [
        # q and k, of two streams and of one.
        ("QwenImageTransformer2DModel", "tiny", 4),
        ("ZImageTransformer2DModel", "tiny", 2),
        # These rotate real numbers.
        ("FluxTransformer2DModel", "tiny", 0),
        ("WanTransformer3DModel", "tiny", 0),
    ],
)
def test_every_rotary_embedding_of_a_model_is_rewritten(
    class_name: str, preset: str, products: int
) -> None:
    model = random_model(class_name, preset, width=64, num_blocks=1)
    inputs = make_inputs(model, image_tokens=16, text_tokens=8)
    assert counts(model, **inputs) == (products, 0)


@pytest.mark.parametrize(
    ("class_name", "compiler"),
    [
        ("QwenImageTransformer2DModel", "eager"),
        ("ZImageTransformer2DModel", "eager"),
        # `test_families.py` has this one in int8.
        pytest.param("QwenImageTransformer2DModel", "inductor", marks=pytest.mark.zoo),
        pytest.param("ZImageTransformer2DModel", "inductor", marks=pytest.mark.zoo),
    ],
)
def test_a_model_computes_the_same(
    class_name: str, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(class_name, "tiny", num_blocks=1, dtype=torch.float32)
    inputs = make_inputs(model, image_tokens=16, text_tokens=7, dtype=torch.float32)

    def call() -> torch.Tensor:
        torch._dynamo.reset()
        with torch.no_grad():
            out = compiled(model, compiler=compiler)(**inputs)[0]
        return out if isinstance(out, torch.Tensor) else torch.stack(out)

    rewritten = call()
    monkeypatch.setattr(pipeline, "run", partial(pipeline.run, skip=["real_rotary"]))
    # Roundings differ, and move a code of int8 here and there.
    assert error(rewritten, call()) < 2e-3


SHAPES = [
    ((1, 19, 2, 34), (19, 1, 17)),
    ((3, 5, 2, 14), (3, 5, 1, 7)),
    ((2, 7, 38), (19,)),
    ((7, 6), (5, 1, 3)),  # the frequencies have more dimensions
    ((1, 1, 2), (4, 3, 9)),  # and are longer
    ((5, 1, 8), (1, 3, 1)),
    ((2,), ()),
    ((0, 3, 4), (3, 2)),
]


@pytest.mark.parametrize(("shape", "other"), SHAPES)
@pytest.mark.parametrize("order", ["pairs first", "frequencies first", "both pairs"])
def test_products_are_those_of_complex_numbers(
    shape: tuple[int, ...], other: tuple[int, ...], order: str
) -> None:
    def function(pairs: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        a = torch.view_as_complex(pairs)
        if order == "both pairs":
            f = torch.view_as_complex(f)
        return torch.view_as_real(torch.mul(f, a) if order == "frequencies first" else a * f)

    x, f = torch.randn(shape), unit(*other)
    inputs = x.unflatten(-1, (-1, 2)), torch.view_as_real(f) if order == "both pairs" else f
    ((gm, values),) = traced(function, *inputs)
    rewritten = lowered(gm)
    assert (complex_products(gm), complex_products(rewritten)) == (1, 0)
    (out,), (before,) = rewritten(*values), gm(*values)
    assert (out.shape, out.dtype) == (before.shape, torch.float32)
    assert out.stride() == before.stride()
    check(out.flatten(-2), x, f)
    for node in rewritten.graph.nodes:
        assert node.op == "output" or node.meta["example_value"] is not None


FOUND: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "method": lambda a, f: torch.view_as_real(a.mul(f)),
    "overloads": lambda a, f: torch.ops.aten.view_as_real.default(
        torch.ops.aten.mul.Tensor(torch.ops.aten.view_as_complex.default(torch.view_as_real(a)), f)
    ),
    "read twice": lambda a, f: [torch.view_as_real(p) + i for p in [a * f] for i in (1, 2)],
    "squared": lambda a, f: torch.view_as_real(a * a),
    "chained": lambda a, f: rotate(rotate(torch.view_as_real(a).flatten(-2), f), f),
    "pairs read again": lambda a, f: (torch.view_as_real(a * f), a.real),
    "in another layout": lambda a, f: torch.view_as_real(a * f.t().contiguous().t()),
    "all in another layout": lambda a, f: (
        torch.view_as_real(torch.view_as_complex(torch.view_as_real(a).transpose(0, 1)) * f.t())
        .transpose(0, 1)
        .view(-1)
    ),
    "written": lambda a, f: torch.view_as_real(a * f).mul_(3),
    "viewed twice and written": lambda a, f: (
        lambda p: (torch.view_as_real(p).mul_(3), torch.view_as_real(p) + 1)
    )(a * f),
    "frequencies written": lambda a, f: (
        lambda g: (g.mul_(2), torch.view_as_real(a * g), g.mul_(2))
    )(f.clone()),
}


def of_pairs(function: Callable[..., Any]) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    return lambda x, f: function(torch.view_as_complex(x), f)


def same(function: Callable[..., Any], x: torch.Tensor, f: torch.Tensor) -> tuple[int, int]:
    """Compare a function's results before and after; returns its complex products, both times."""
    ((gm, values),) = traced(function, x, f)
    after = lowered(gm)
    for out, before in zip(after(*values), gm(*values), strict=True):
        pair = [torch.view_as_real(t) if t.is_complex() else t for t in (out, before)]
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-5)
        assert out.stride() == before.stride()
    return complex_products(gm), complex_products(after)


@pytest.mark.parametrize("name", FOUND)
def test_other_ways_to_write_it_are_found(name: str) -> None:
    found, left = same(of_pairs(FOUND[name]), torch.randn(5, 7, 2), unit(5, 7))
    assert found >= 1
    assert left == 0


LEFT: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "read as complex numbers too": lambda a, f: (lambda p: (torch.view_as_real(p), p + 1))(a * f),
    "returned": lambda a, f: a * f,
    "added": lambda a, f: torch.view_as_real(a * f + 1),
    "only its real part": lambda a, f: (a * f).real,
    "divided": lambda a, f: torch.view_as_real(a / f),
    "in place": lambda a, f: torch.view_as_real(a.clone().mul_(f)),
    "into another": lambda a, f: torch.view_as_real(torch.mul(a, f, out=torch.empty_like(f))),
    "by a number": lambda a, f: torch.view_as_real(a * 2j),
    "by real numbers": lambda a, f: torch.view_as_real(a * f.real),
    "by double precision": lambda a, f: torch.view_as_real(a * f.to(torch.complex128)),
    "all in double precision": lambda a, f: torch.view_as_real(
        torch.view_as_complex(torch.view_as_real(a).double()) * f.to(torch.complex128)
    ),
    "conjugated": lambda a, f: torch.view_as_real(a * f.conj()),
    "negated": lambda a, f: torch.view_as_real(a * torch._neg_view(f)),
    "complex from the start": lambda a, f: torch.view_as_real(f * f.exp()),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_only_looks_like_it_is_left(name: str) -> None:
    found, left = same(of_pairs(LEFT[name]), torch.randn(5, 7, 2), unit(5, 7))
    assert found == left


def test_real_numbers_are_left() -> None:
    def function(x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return (x * f).flatten(-2)

    ((gm, _),) = traced(function, torch.randn(5, 7, 2), torch.randn(7, 2))
    targets = [[n.target for n in g.graph.nodes] for g in (gm, lowered(gm))]
    assert targets[0] == targets[1]


# In the second one the result would have the same shape, of other pairs.
@pytest.mark.parametrize(("shape", "swapped"), [((2, 7, 2), (0, 2)), ((1, 7, 2), (0, 1))])
def test_pairs_that_get_another_shape_later_are_left(
    shape: tuple[int, ...], swapped: tuple[int, int]
) -> None:
    def function(x: torch.Tensor, f: torch.Tensor) -> Any:
        y = x.clone()
        a = torch.view_as_complex(y)
        y.transpose_(*swapped)
        return torch.view_as_real(a * f), y

    f = unit(7, 7) if shape[0] == 1 else unit(*shape[:2])
    assert same(function, torch.randn(shape), f) == (1, 1)


def test_a_changing_number_of_tokens_is_compiled_once() -> None:
    graphs = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(lowered(gm))
        assert complex_products(graphs[-1]) == 0
        return graphs[-1].forward

    function = torch.compile(rotate, backend=backend)
    for tokens in (19, 7, 1, 64):
        x, f = torch.randn(1, tokens, 2, 14), unit(tokens, 1, 7)
        if tokens == 19:
            torch._dynamo.mark_dynamic(x, 1)
            torch._dynamo.mark_dynamic(f, 0)
        if tokens > 1:
            check(function(x, f), x, f)
    assert len(graphs) == 1


def test_every_size_may_change() -> None:
    function = torch.compile(rotate, backend="omniq", options={"method": "int8"}, dynamic=True)
    for shape in ((2, 19, 4, 14), (3, 7, 2, 38)):
        x, f = torch.randn(shape), unit(shape[1], 1, shape[-1] // 2)
        check(function(x, f), x, f)


@pytest.mark.parametrize("target", ["cpu:generic", "cuda:sm_90"])
def test_inductor_generates_code_for_all_of_it(target: str) -> None:
    on = Target.parse(target)
    if on.device != "cpu" and absent_gpu.why_not(on) is not None:
        pytest.skip(str(absent_gpu.why_not(on)))
    block = Block()
    ((gm, _),) = traced(block.bfloat16(), *block.inputs())
    programs = (generated.program(lowered(gm, on, skip), {}, on) for skip in (("real_rotary",), ()))
    before, after = (text[text.index("def call(") :] for text in programs)
    assert before.count("torch.ops.aten.mul.Tensor(") == 2
    assert "torch.ops.aten.mul" not in after
    assert "torch.ops.aten.view_as_complex" not in after
    # The host calls one operator of complex numbers for each table.
    complex_calls = re.findall(r"= torch\.ops\.aten\.(\w+)\.", after)
    assert complex_calls == ["view_as_real", "view_as_real"]
    # The norm's kernel writes into the concatenation: nothing is stored in float32.
    if on.device == "cuda" and torch.__version__ >= "2.13":
        assert (after.count(".run("), before.count(".run(")) == (2, 3)
        assert ("torch.float32)" in after, "torch.float32)" in before) == (False, True)


@interpreted
def test_a_program_for_a_gpu_rotates_as_eager_does(tmp_path: Path) -> None:
    block = Block()
    inputs = block.inputs()
    case = make(block, inputs, "int8", "cuda:sm_90")
    assert "view_as_complex" not in case.program
    (out,) = interpret({"block": case}, tmp_path)["block"]
    expected = block(*inputs)
    assert (out.shape, out.dtype) == (expected.shape, torch.bfloat16)
    # Eager rounds the norm to BF16 once more.
    assert error(out, expected) < 4e-3
    assert error(out.roll(1, -1), expected) > 0.1


def test_frequencies_are_inputs_of_a_block_or_computed_in_the_graph() -> None:
    table, x = unit(64, 7), torch.randn(1, 19, 2, 14)
    rows = torch.randint(64, (19,))

    def function(x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        parts = table.split([3, 4], dim=1)
        return rotate(x, torch.cat([part[rows] for part in parts], dim=-1).to(x.device)[:, None])

    assert counts(function, x, table, rows) == (1, 0)
    out = torch.compile(function, backend="omniq", options={"method": "int8"})(x, table, rows)
    check(out, x, table[rows][:, None])
