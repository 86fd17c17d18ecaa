"""Every stage prints as a short Python program that runs and computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS, Holder, error, stage_inputs, traced
from torch import fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from omniq_compile import QuantConfig
from omniq_compile.lowering.target import Target
from omniq_compile.models.families import FAMILIES
from omniq_compile.models.random_models import make_inputs, random_model
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context
from omniq_compile.passes.printing.node_words import describe
from omniq_compile.passes.printing.program import program

GOLDEN = """\
# a golden program
import torch


def forward(
    mlp_up_bias,  # f32[19]
    x,  # f32[2, 7, 38]
    head_weight,  # f32[3, 38]
    mlp_up_codes,  # i8[19, 38]
    mlp_up_scale,  # f32[19]
    mlp_down_codes,  # i8[38, 19]
    mlp_down_scale,  # f32[38]
):
    # mlp.up
    quantize = torch.ops.omniq.quantize.default(x, 'int8')  # i8[2, 7, 38], f32[2, 7]
    linear = torch.ops.omniq.gemm.default(quantize, [mlp_up_codes, mlp_up_scale], mlp_up_bias, \
'int8', 'int8', torch.float32)  # f32[2, 7, 19]  int8: cpu_s8_float32
    # mlp
    gelu = torch._C._nn.gelu(linear, approximate = 'tanh')  # f32[2, 7, 19]
    # mlp.down
    quantize_1 = torch.ops.omniq.quantize.default(gelu, 'int8')  # i8[2, 7, 19], f32[2, 7]
    linear_1 = torch.ops.omniq.gemm.default(quantize_1, [mlp_down_codes, mlp_down_scale], None, \
'int8', 'int8', torch.float32)  # f32[2, 7, 38]  int8: cpu_s8_float32
    # head
    linear_2 = torch._C._nn.linear(linear_1, head_weight, None)  # f32[2, 7, 3]  kept: N = 3 is \
under min_features = 4
    return (linear_2,)
"""


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(38, 19), nn.Linear(19, 38, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = Mlp(), nn.Linear(38, 3, bias=False)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mlp(x))


def stages(gm: fx.GraphModule, **options: Any) -> tuple[dict[str, fx.GraphModule], Context]:
    config = QuantConfig.from_options(OPTIONS | {"min_features": 4} | options)
    context = Context(config, Target("cpu", "generic"), stages={})
    pipeline.run(gm, context)
    assert context.stages is not None
    return context.stages, context


def execute(text: str, gm: fx.GraphModule, inputs: list[Any]) -> list[Any]:
    namespace: dict[str, Any] = {}
    exec(compile(text, "program", "exec"), namespace)
    owner = [gm] if "    self,\n" in text else []
    with torch.no_grad():
        return tree_leaves(namespace["forward"](*owner, *inputs))


def copies(inputs: list[Any]) -> list[Any]:
    """Inputs for one run: a graph may write to them."""
    return [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs]


def same(results: list[Any], expected: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if not isinstance(b, torch.Tensor):
            return bool(a == b)
        return a.dtype is b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)

    return all(equal(a, b) for a, b in zip(results, expected, strict=True))


def check_every_stage(
    gm: fx.GraphModule, inputs: list[Any], limit: float, **options: Any
) -> Iterator[str]:
    """Run the text of each stage: as traced bitwise, then near it; yields the texts."""
    graphs, context = stages(gm, **options)
    assert list(graphs) == ["traced", "quantized", "lowered"]
    with torch.no_grad():
        eager = tree_leaves(gm(*copies(inputs)))
    results = {}
    for name, graph in graphs.items():
        text = program(graph, name)
        arguments = stage_inputs(graph, gm, copies(inputs), context)
        results[name] = execute(text, graph, arguments)
        yield text
    assert same(results["traced"], eager)
    # Lowering replaces operators by the same arithmetic.
    assert same(results["lowered"], results["quantized"])
    for result, expected in zip(results["quantized"], eager, strict=True):
        if not isinstance(expected, torch.Tensor) or expected.dtype in (torch.bool, torch.int64):
            assert same([result], [expected])
        else:
            finite = expected.isfinite()
            assert torch.equal(result.isfinite(), finite)
            assert error(result[finite], expected[finite]) < limit


def test_a_golden_program() -> None:
    ((gm, _),) = traced(Model(), torch.randn(2, 7, 38))
    assert program(stages(gm)[0]["quantized"], "a golden program") == GOLDEN


def test_every_stage_of_a_small_model_runs() -> None:
    ((gm, inputs),) = traced(Model(), torch.randn(2, 7, 38))
    texts = list(check_every_stage(gm, inputs, 0.03))
    for text, stage in zip(texts, ("traced", "quantized", "lowered"), strict=True):
        assert text.startswith(f"# {stage}\nimport torch\n")
        for line in ("# mlp.up\n", "# mlp.down\n", "# head\n", "x,  # f32[2, 7, 38]\n"):
            assert f"    {line}" in text
        assert "kept: N = 3 is under min_features = 4" in text
        assert text.count("int8: cpu_s8_float32") == 2
    assert [text.count("torch.ops.omniq.gemm") for text in texts] == [0, 2, 0]


def test_two_traces_print_the_same_text() -> None:
    texts = []
    for _ in range(2):
        torch._dynamo.reset()
        ((gm, _),) = traced(Model(), torch.randn(2, 7, 38))
        texts.append([program(graph) for graph in stages(gm)[0].values()])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_of_a_family_runs(name: str) -> None:
    model = random_model(name, "tiny", num_blocks=1, dtype=torch.float32)
    inputs = make_inputs(model, image_tokens=12, text_tokens=5, dtype=torch.float32)
    graphs = traced(model, **inputs)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    layers, gemms = set(), 0
    for gm, example_inputs in graphs:
        _, quantized, _ = check_every_stage(gm, example_inputs, 0.05, min_features=1)
        layers |= {line.strip(" #") for line in quantized.splitlines() if line.startswith("    #")}
        gemms += quantized.count("torch.ops.omniq.gemm.default(")
    assert linears <= layers
    assert gemms == len(linears)


@torch.compiler.allow_in_graph
def allowed(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def in_autocast(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, w)


def in_place(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, w)
    y[:, 1:-1:2, None] = 0
    y += 1
    return y.mul_(2)


# name: a graph whose text needs more than `import torch` and plain names
DIFFICULT: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "infinities": lambda x, w: F.linear(x, w).masked_fill(w[:7, :19] > 0, -float("inf")),
    "nan": lambda x, w: torch.where(w[:, :7].T > 0, F.linear(x, w), float("nan")),
    "device_and_dtype": lambda x, w: F.linear(x, w) + torch.arange(19, device=x.device).to(x.dtype),
    "new_device": lambda x, w: F.linear(x, w).to(torch.device("cpu"), torch.float64),
    "memory_format": lambda x, w: F.linear(x[None, None], w).contiguous(
        memory_format=torch.channels_last
    ),
    "named_tuple": lambda x, w: F.linear(x, w).max(dim=1).values,
    "complex": lambda x, w: torch.polar(F.linear(x, w), w[:7, :19]) * 1j,
    "subscripts": lambda x, w: F.linear(x, w)[..., None, ::2][:-1],
    "nested_output": lambda x, w: {"a": [F.linear(x, w), (x, None, 3)], "b": "text"},
    "split": lambda x, w: F.linear(x, w).split([9, 10], dim=-1),
    "interpolate": lambda x, w: F.interpolate(F.linear(x, w)[None], scale_factor=2.0),
    "attention": lambda x, w: F.scaled_dot_product_attention(*(3 * (F.linear(x, w)[None],))),
    "operators": lambda x, w: -(abs(F.linear(x, w)) ** 0.5) / 3 - 2 + (x[:, :19] // 3) % 2,
    "autocast": in_autocast,
    "in_place": in_place,
    "own_function": lambda x, w: allowed(F.linear(x, w)),
    "checkpoint": lambda x, w: checkpoint(lambda t: t.cos(), F.linear(x, w), use_reentrant=False),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFICULT)
def test_every_stage_of_a_difficult_graph_runs(name: str) -> None:
    model = Holder(DIFFICULT[name], w=torch.randn(19, 38))
    ((gm, inputs),) = traced(model, torch.randn(7, 38))
    texts = list(check_every_stage(gm, inputs, 0.05))
    assert [text.count("torch.ops.omniq.gemm.default(") for text in texts] == [0, 1, 0]


def test_names_that_python_or_torch_own_are_avoided() -> None:
    class Awkward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.torch, self.codes = (nn.Linear(38, 38) for _ in range(3))
            self.requires_grad_(False)

        def forward(self, x: Any, lambda_: Any, torch_: Any, input: Any, codes_: Any) -> Any:
            return self.x(x) + self.torch(lambda_) + self.codes(torch_) + input + codes_

    ((gm, inputs),) = traced(Awkward(), *torch.randn(5, 7, 38))
    texts = list(check_every_stage(gm, inputs, 0.03))
    assert texts[1].count("torch.ops.omniq.gemm.default(") == 3


def test_functions_of_numpy_are_named_in_comments() -> None:
    model = Holder(lambda x, w: F.linear(torch.from_numpy(x.numpy() * 2), w), w=torch.randn(19, 38))
    ((gm, _),) = traced(model, torch.randn(7, 38))
    for graph in stages(gm)[0].values():
        text = program(graph)
        compile(text, "program", "exec")
        (line,) = (line for line in text.splitlines() if line.startswith("# "))
        name, _, what = line.removeprefix("# ").partition(": ")
        assert "mul" in what
        assert f" = {name}(" in text


def test_symbolic_sizes_are_arguments() -> None:
    model = Holder(lambda x, w: F.linear(x, w).reshape(x.shape[0] * 19), w=torch.randn(19, 38))
    x = torch.randn(7, 38)
    torch._dynamo.mark_dynamic(x, 0)
    ((gm, inputs),) = traced(model, x)
    inputs = [7 if isinstance(i, torch.SymInt) else i for i in inputs]
    _, quantized, _ = check_every_stage(gm, inputs, 0.03)
    assert "# f32[s" in quantized


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(1, 2, dtype=torch.bfloat16), "bf16[1, 2]"),
        (torch.zeros((), dtype=torch.bool), "bool[]"),
        (torch.zeros(3, dtype=torch.complex128), "complex128[3]"),
        ((torch.zeros(2), [torch.zeros(1, dtype=torch.int8)]), "f32[2], i8[1]"),
        (3, "int"),
        (None, ""),
    ],
)
def test_a_value_is_described_in_few_letters(value: Any, text: str) -> None:
    assert describe(value) == text
