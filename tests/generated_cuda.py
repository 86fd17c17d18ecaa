"""A transformer block as Inductor would run it on an NVIDIA GPU that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quantized_inputs, traced
from torch import fx, nn
from torch.nn import functional
from triton_interpreter import interpreter_works

from omniq_compile import QuantConfig
from omniq_compile.compiling.inductor import settings_of
from omniq_compile.inspector import absent_gpu, generated
from omniq_compile.lowering.target import Target
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context

BF16 = torch.bfloat16

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not interpreter_works(),
    reason="this machine has a GPU, or a Triton that cannot interpret: none, or 3.6 with numpy 2.4",
)

VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "fp8": {"method": "fp8"},
    "fp8 block-wise": {"method": "fp8", "weight_block_size": [64, 64]},
    "mxfp8": {"method": "mxfp8"},
    "mxfp4": {"method": "mxfp4"},
    "mxfp4 W4A8": {"method": "mxfp4", "w4a8_fallback_layers": ["re:.*"]},
    "mxfp4_dualscale": {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0},
    "int8 timed": {"method": "int8", "mode": "max-autotune-no-cudagraphs"},
}


class Block(nn.Module):
    """Modulation, attention whose q, k and v share their input, and an MLP: seven layers."""

    def __init__(self, width: int = 256, hidden: int = 384) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor, mask: Any = None) -> torch.Tensor:
        scale, shift = self.modulation(functional.silu(time)).unsqueeze(1).chunk(2, dim=-1)
        normed = functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        heads = [
            layer(normed).unflatten(-1, (4, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        ]
        attended = functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(x), approximate="tanh"))


class Mlp(nn.Module):
    """What follows attention: two layers, where seven take Inductor too long."""

    def __init__(self, width: int = 256, hidden: int = 384) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        normed = functional.layer_norm(x, x.shape[-1:]) * (1 + time.unsqueeze(1))
        return x + self.down(functional.gelu(self.up(normed), approximate="tanh"))


class SingleStream(nn.Module):
    """Rows of text before an image's, and two results side by side, as in FLUX: three layers."""

    def __init__(self, width: int = 192, hidden: int = 768) -> None:
        super().__init__()
        self.attend, self.up = nn.Linear(width, width), nn.Linear(width, hidden)
        self.out = nn.Linear(width + hidden, width)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([text, image])
        wide = functional.gelu(self.up(rows), approximate="tanh")
        both = torch.cat([self.attend(rows), wide], dim=-1).unsqueeze(0)
        out: torch.Tensor = self.out(both)
        return out


class Layer(nn.Module):
    """One layer of sizes that differ, whose input nothing computes."""

    def __init__(self, K: int = 192, N: int = 112) -> None:
        super().__init__()
        self.layer = nn.Linear(K, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


@dataclass(frozen=True)
class Case:
    """A graph for one target: Inductor's program, its inputs, and what it should return."""

    program: str
    inputs: list[Any]
    outputs: tuple[Any, ...]
    context: Context

    @property
    def expected(self) -> torch.Tensor:
        """The only output."""
        (expected,) = self.outputs
        assert isinstance(expected, torch.Tensor)
        return expected


def make(
    model: nn.Module,
    inputs: Any,
    variant: str,
    target: str,
    later: torch.Tensor | None = None,
) -> Case:
    """Generate the program of a model in BF16, which is one graph; see `generate`.

    Args:
        later: in place of the first input, whose number of rows the program is not to know.
    """
    model = model.to(BF16).requires_grad_(False)
    if later is not None:
        torch._dynamo.mark_dynamic(inputs[0], 0)
    ((graph, values),) = traced(model, *inputs)
    if later is not None:
        values = [later if value is inputs[0] else value for value in values]
        values = [v if isinstance(v, torch.Tensor) else later.shape[0] for v in values]
    return generate(graph, values, variant, target)


def generate(graph: fx.GraphModule, values: list[Any], variant: str, target: str) -> Case:
    """Generate a graph's program; what is expected is the reference of omniq's operators."""
    config = QuantConfig.from_options({"min_features": 1} | VARIANTS[variant])
    context = Context(config, Target.parse(target), stages={})
    assert absent_gpu.why_not(context.target) is None
    lowered = pipeline.run(graph, context)
    program = generated.program(lowered, settings_of(config), context.target)
    assert context.stages is not None
    quantized = context.stages["quantized"]
    with torch.no_grad():
        known = quantized_inputs(graph, values, context, lowered=False)
        outputs = quantized(*_take(known, quantized))
        known = quantized_inputs(graph, values, context, lowered=True)
    return Case(program, _take(known, lowered), outputs, context)


def interpret(cases: dict[str, Case], folder: Path) -> dict[str, list[Any]]:
    """Run programs in Triton's interpreter, a process of its own; returns their outputs."""
    torch.save({name: (c.program, c.inputs) for name, c in cases.items()}, folder / "cases.pt")
    script = Path(__file__).with_name("interpreted_program.py")
    command = [sys.executable, str(script), str(folder / "cases.pt"), str(folder / "results.pt")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = torch.load(folder / "results.pt")
    return found


def launches(program: str) -> tuple[int, Counter[str]]:
    """Count launches of generated kernels; and of omniq's and calls of operators, by name."""
    body = program[program.index("def call(") :]
    started = re.findall(r"(\w+)\.run\(", body)
    own = [re.sub(r"_\d+$", "", name) for name in started if not name.startswith("triton_")]
    operators = re.findall(
        r"^ +(?:buf\d+ = )?((?:extern_kernels|torch\.ops)\.[\w.]+)\(", body, re.M
    )
    kept = [name for name in operators if "view.dtype" not in name and "attention" not in name]
    return len(started) - len(own), Counter(own + kept)


def _take(values: dict[str, Any], gm: fx.GraphModule) -> list[Any]:
    taken = (values[n.name] for n in gm.graph.nodes if n.op == "placeholder")
    return [v.detach() if isinstance(v, torch.Tensor) else v for v in taken]
