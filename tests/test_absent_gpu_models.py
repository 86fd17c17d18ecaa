"""The four families, as Inductor would run them on an NVIDIA GPU, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, traced
from generated_cuda import VARIANTS, Case, generate, interpret, interpreted
from torch import fx

from omniq_compile.models.families import FAMILIES
from omniq_compile.models.random_models import make_inputs, random_model

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


def check(cases: list[Case], calls: list[tuple[fx.GraphModule, Any]], folder: Path) -> None:
    """Check that each case is as near to its graph in BF16 as its reference is."""
    # A graph without operations has no program.
    named = {str(number): case for number, case in enumerate(cases) if case.program}
    results = interpret(named, folder)
    quantized = 0
    for name, case in named.items():
        graph, values = calls[int(name)]
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


# Of one block `test_absent_gpu.py` checks the same; these take half a minute each.
@pytest.mark.zoo
@pytest.mark.parametrize(("family", "variant", "arch"), CASES)
@torch.no_grad()
def test_a_model_is_as_near_to_bf16_as_its_reference(
    family: str, variant: str, arch: str, tmp_path: Path
) -> None:
    model = random_model(family, "tiny", num_blocks=1)
    graphs = traced(model, **make_inputs(model, image_tokens=36, text_tokens=7))
    cases = [generate(graph, values, variant, f"cuda:{arch}") for graph, values in graphs]
    check(cases, graphs, tmp_path)


@pytest.mark.zoo
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["int8", "fp8", "mxfp8"])
@torch.no_grad()
def test_a_model_of_any_resolution_is_too(family: str, variant: str, tmp_path: Path) -> None:
    model = random_model(family, "tiny", num_blocks=1)
    calls: list[tuple[fx.GraphModule, Any]] = []

    def record(graph: fx.GraphModule, inputs: Any) -> Any:
        def run(*values: Any) -> Any:
            calls.append((graph, list(values)))
            return graph(*values)

        return run

    compiled = torch.compile(model, backend=record)
    for image, text in ((36, 7), (64, 9), (100, 11), (144, 11)):
        compiled(**make_inputs(model, image_tokens=image, text_tokens=text))
    # The last graph was traced for another resolution than the last.
    graph, values = calls[-1]
    assert sum(called is graph for called, _ in calls) > 1
    check([generate(graph, values, variant, "cuda:sm_90")], calls[-1:], tmp_path)
