"""GPUs that have no e4m3 are given no program that reads or writes it."""

from __future__ import annotations

from typing import Any

import generated_triton
import pytest
import torch
from conftest import traced
from generated_cuda import BF16, Layer
from torch import nn

from omniq_compile import QuantConfig
from omniq_compile.compiling.inductor import settings_of
from omniq_compile.inspector import absent_gpu, generated
from omniq_compile.lowering.target import Target
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")

FLOAT32 = torch.float32


class Scores(nn.Module):
    """Two activations, as in attention."""

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.transpose(-1, -2)


@pytest.mark.parametrize(
    ("model", "dtype", "shapes", "more", "kernel"),
    [
        (Layer(), FLOAT32, [(150, 192)], {"weight_block_size": [64, 64]}, "cuda_fp8_float32"),
        (Layer(), BF16, [(150, 192)], {"weight_block_size": [64, 48]}, "cuda_fp8_float32"),
        (Scores(), BF16, [(2, 40, 192), (2, 48, 192)],
         {"weight_block_size": [64, 64], "matmul": True}, "cuda_fp8_float32"),
        (Layer(), FLOAT32, [(150, 192)], {}, "cuda_fp8_float32"),
        (Layer(193), BF16, [(150, 193)], {}, "cuda_fp8_weight_only_triton"),
        (Layer(), FLOAT32, [(150, 192)], {"activation_scheme": "none"}, "cuda_fp8_weight_only"),
    ],
    ids=["blocks in float32", "blocks of 48", "two activations", "float32", "odd K", "weights"],
)  # fmt: skip
def test_fp8_compiles_for_sm_80(
    model: nn.Module, dtype: torch.dtype, shapes: list[Any], more: dict[str, Any], kernel: str
) -> None:
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    ((graph, _),) = traced(model.to(dtype).requires_grad_(False), *inputs)
    config = QuantConfig.from_options({"method": "fp8", "min_features": 1} | more)
    context = Context(config, Target.parse("cuda:sm_80"), stages={})
    assert absent_gpu.why_not(context.target) is None
    lowered = pipeline.run(graph, context)
    (site,) = context.sites
    assert site.decision.kernel is not None
    assert site.decision.kernel.name == kernel
    program = generated.program(lowered, settings_of(config), context.target)
    compiled = [
        generated_triton.compile_kernel(k, "sm_80") for k in generated_triton.kernels(program)
    ]
    assert compiled
    assert all(".target sm_80" in text for text in compiled)
