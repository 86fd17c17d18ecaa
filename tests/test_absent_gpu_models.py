"""The four families, as Inductor would run them on an NVIDIA GPU, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import error, traced
from generated_cuda import VARIANTS, generate, interpret, interpreted

from omniq_compile.cli.families import FAMILIES
from omniq_compile.cli.random_models import make_inputs, random_model

pytest.importorskip("triton")
pytestmark = interpreted

CASES = [
    *(
        (family, variant, "sm_90")
        for family in FAMILIES
        for variant in VARIANTS
        if "timed" not in variant
    ),
    *((family, variant, "sm_100") for family in FAMILIES for variant in ("mxfp8", "mxfp4")),
    *(("QwenImageTransformer2DModel", variant, "sm_80") for variant in ("int8", "fp8")),
]


# Of one block `test_absent_gpu.py` checks the same; these take half a minute each.
@pytest.mark.zoo
@pytest.mark.parametrize(("family", "variant", "arch"), CASES)
@torch.no_grad()
def test_a_model_is_as_near_to_bf16_as_its_reference(
    family: str, variant: str, arch: str, tmp_path: Path
) -> None:
    model = random_model(family, "tiny", num_blocks=1)
    graphs = traced(model, **make_inputs(model, image_tokens=36, text_tokens=7))
    cases = {
        str(number): generate(graph, values, variant, f"cuda:{arch}")
        for number, (graph, values) in enumerate(graphs)
    }
    # A graph without operations has no program.
    cases = {name: case for name, case in cases.items() if case.program}
    results = interpret(cases, tmp_path)
    quantized = 0
    for name, case in cases.items():
        graph, values = graphs[int(name)]
        for found, expected, plain in zip(results[name], case.outputs, graph(*values), strict=True):
            if not isinstance(found, torch.Tensor) or torch.equal(expected, plain):
                assert torch.equal(torch.as_tensor(found), torch.as_tensor(plain))
                continue
            assert (found.shape, found.dtype) == (plain.shape, plain.dtype)
            of_format = error(expected, plain)
            # Operations that are fused skip roundings to BF16, which moves a code here and there.
            assert error(found, expected) < of_format
            assert error(found, plain) < 1.15 * of_format
            quantized += 1
    assert quantized
