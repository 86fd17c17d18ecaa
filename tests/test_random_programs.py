"""Random programs, rewritten with a kernel that loses nothing, compute what they did before."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniq_compile.lowering import cpu, formats
from omniq_compile.lowering.formats.format import Format
from omniq_compile.lowering.target import ARCHITECTURES

OPTIONS = {"method": "int8", "min_features": 1, "compiler": "aot_eager"}
# Every value of a program is [batch, tokens, WIDTH], and every weight has this width on each side.
WIDTH, HEADS = 24, 3
STEPS = 12
Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def spread(x: Tensor) -> Tensor:
    """Keep the numbers of a long program of the size of its inputs."""
    return F.layer_norm(x, x.shape[-1:])


# Ways to multiply x by a weight, some with another value y.
PRODUCTS: dict[str, Step] = {
    "layer": lambda m, x, y: m.layer(x),
    "narrow layer": lambda m, x, y: F.pad(m.narrow(x), (0, 5)),
    "linear": lambda m, x, y: F.linear(x, m.w, m.b),
    "transposed": lambda m, x, y: x @ m.w.t(),
    "matmul": lambda m, x, y: torch.matmul(x, m.v) + m.b,
    "left": lambda m, x, y: (m.w @ x.transpose(1, 2)).transpose(1, 2),
    "addmm": lambda m, x, y: torch.addmm(m.b, x.flatten(0, 1), m.v).view(x.shape),
    "scaled addmm": lambda m, x, y: torch.addmm(
        y.flatten(0, 1), x.flatten(0, 1), m.v, beta=0.5, alpha=2
    ).view(x.shape),
    "einsum": lambda m, x, y: torch.einsum("btk,nk->btn", x, m.w),
    "einsum by heads": lambda m, x, y: torch.einsum(
        "btk,khd->bthd", x, m.v.view(WIDTH, HEADS, -1)
    ).flatten(2),
    "tensordot": lambda m, x, y: torch.tensordot(x, m.v, dims=([2], [0])),
    "sliced": lambda m, x, y: F.linear(x, m.wide[WIDTH : 2 * WIDTH]),
    "rows far apart": lambda m, x, y: F.linear(x, m.wide[1::3]),
    "of a stack": lambda m, x, y: x @ m.stack[1] + x @ m.stack[0],
    "batches": lambda m, x, y: torch.bmm(
        x.unflatten(2, (HEADS, -1)).permute(2, 0, 1, 3).flatten(1, 2), m.small
    ).unflatten(1, x.shape[:2]).permute(1, 2, 0, 3).flatten(2),
    "concatenated": lambda m, x, y: F.linear(x, torch.cat([m.w[:7], m.v[7:]])),
    "scaled": lambda m, x, y: F.linear(x, m.w * m.g[:, None]),
    "merged adapter": lambda m, x, y: F.linear(x, m.w + 0.5 * (m.up @ m.down)),
    "adapter": lambda m, x, y: m.layer(x) + F.linear(F.linear(x, m.down), m.up),
    "tied": lambda m, x, y: F.linear(F.linear(x, m.w), m.w.t()),
    "written weight": lambda m, x, y: F.linear(x, m.written.mul_(0.5)) * m.written.add_(0.1)[0],
    "attention": lambda m, x, y: F.scaled_dot_product_attention(
        *(
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in F.linear(x, m.wide).chunk(3, dim=-1)
        )
    ).transpose(1, 2).flatten(2),
    "attention by hand": lambda m, x, y: (
        F.linear(x, m.w) @ F.linear(y, m.v).transpose(1, 2) / math.sqrt(WIDTH)
    ).softmax(-1) @ y,
    "gated": lambda m, x, y: F.silu(m.layer(x)) * F.linear(y, m.w),
    "one token": lambda m, x, y: x + m.layer(y[:, :1]).expand_as(x),
    "one row": lambda m, x, y: x + F.linear(y[0, 0], m.w),
}  # fmt: skip


def reshaped(change: Callable[[Tensor], Tensor]) -> Step:
    """Give the result of a product another shape in place, and use it."""

    def step(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = F.linear(x, m.w)
        change(z)
        return x + z.reshape(x.shape)

    return step


def written(write: Callable[[Tensor, Tensor], Any], of: Step) -> Step:
    """Write to what a product read or returned, and use both."""

    def step(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        z = of(m, x, y)
        write(x, y)
        write(z, x)
        return x + z + m.layer(x)

    return step


def broken(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = m.layer(x)
    torch._dynamo.graph_break()
    return m.layer(x) + y


def remembering(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Leave something in a buffer for the next call."""
    z = m.layer(x) + m.memory
    m.memory.lerp_(z.mean((0, 1)), 0.5)
    return z


CHANGES: dict[str, Step] = {
    "unsqueezed": reshaped(lambda z: z.unsqueeze_(1)),
    "swapped": reshaped(lambda z: z.transpose_(0, 1)),
    "added to": written(lambda z, other: z.add_(other, alpha=0.1), PRODUCTS["linear"]),
    "a part set": written(lambda z, other: z[:, :2].copy_(other[:, -2:]), PRODUCTS["matmul"]),
    "relu_": written(lambda z, other: F.relu_(z), PRODUCTS["sliced"]),
    "a view multiplied": written(lambda z, other: z.view(-1)[::3].mul_(2), PRODUCTS["layer"]),
    "broken": broken,
    "remembering": remembering,
    "an input": lambda m, x, y: x.mul_(0.9) + m.layer(x),
    "norm": lambda m, x, y: F.gelu(x, approximate="tanh") * torch.sigmoid(y),
}


class Program(nn.Module):
    """Random steps, each on two of the values that there are; their results are spread."""

    layer: nn.Module
    memory: Tensor

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        shapes = {
            "w": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "b": (WIDTH,), "g": (WIDTH,),
            "wide": (3 * WIDTH, WIDTH), "stack": (2, WIDTH, WIDTH), "written": (WIDTH, WIDTH),
            "small": (HEADS, WIDTH // HEADS, WIDTH // HEADS), "up": (WIDTH, 4), "down": (4, WIDTH),
        }  # fmt: skip
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.register_buffer("memory", torch.zeros(WIDTH))
        self.layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.narrow = nn.Linear(WIDTH, WIDTH - 5, bias=False).requires_grad_(False)
        for parameter in (*self.layer.parameters(), *self.narrow.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(WIDTH))
        kinds = [*PRODUCTS] * 2 + [*CHANGES]
        self.names = [draw.choice(kinds) for _ in range(STEPS)]
        self.places = [(draw.randrange(n + 2), draw.randrange(n + 2)) for n in range(STEPS)]

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        values = [x, y]
        for name, (first, second) in zip(self.names, self.places, strict=True):
            step = (PRODUCTS | CHANGES)[name]
            values.append(spread(step(self, values[first], values[second])))
        return values[2:]


@pytest.fixture
def rewritten(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put a format and a kernel that lose nothing in the place of int8's; returns what it ran."""
    problems: list[Any] = []
    matrices: bool = request.param

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.float() * 1, x.float().amax(-1) * 0 + 2

    def allocate(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape, dtype=torch.float32), x.new_empty(x.shape[:-1]).float()

    def gemm(a: Any, b: Any, bias: Tensor | None, problem: Any, scheme: Any) -> Tensor:
        problems.append(problem)
        scale = (a[1].unsqueeze(-1) * b[1].unsqueeze(-2)) / 4
        out = torch.matmul(a[0], b[0].transpose(-1, -2)) * scale
        return (out if bias is None else out + bias).to(problem.dtype)

    exact = Format(
        name="int8", parts=("codes", "scale"), nbytes=lambda N, K: 4 * N * (K + 1),
        quantize=quantize, allocate=allocate, dequantize=lambda parts: parts[0],
    )  # fmt: skip
    kernel = dataclasses.replace(
        next(k for k in cpu.KERNELS if k.method == "int8"),
        archs=ARCHITECTURES["cpu"],
        quantize=lambda x, format: quantize(x),
        gemm=gemm,
        refuse=lambda problem, scheme: "a batch" if matrices and problem.b_rank > 2 else None,
        takes_matrices=matrices,
        start=lambda problem: None,
    )
    monkeypatch.setitem(formats.FORMATS, "int8", exact)
    monkeypatch.setattr(cpu, "KERNELS", (kernel,))
    return problems


def inputs(generator: torch.Generator, tokens: int) -> list[Tensor]:
    return [torch.randn(2, tokens, WIDTH, generator=generator) for _ in range(2)]


def assert_same(program: Program, call: Any, given: list[Tensor], other: Program) -> None:
    """Compare results, and what is left in inputs, parameters and buffers."""
    copies = [x.clone() for x in given]
    actual, expected = call(*given), other(*copies)
    left = [*given, *program.state_dict().values()], [*copies, *other.state_dict().values()]
    for a, e in zip([*actual, *left[0]], [*expected, *left[1]], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


# Programs beyond the first few are run by `make zoo`.
SEEDS = [seed if seed < 4 else pytest.param(seed, marks=pytest.mark.zoo) for seed in range(60)]


@pytest.mark.parametrize("rewritten", [False, True], ids=["rows", "matrices"], indirect=True)
@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_rewriting_changes_no_program(seed: int, rewritten: list[Any]) -> None:
    """At two sizes, and with weights that change between the calls."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    program = Program(draw)
    eager = copy.deepcopy(program)
    call = torch.compile(program, backend="omniq", options=OPTIONS)
    for tokens in (7, 7, 5):
        assert_same(program, call, inputs(generator, tokens), eager)
        name = draw.choice(["w", "v", "wide", "stack", "layer.weight"])
        for model in (program, eager):
            model.get_parameter(name).mul_(-1.5)
    assert len(rewritten) > 3
