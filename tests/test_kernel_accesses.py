"""What PyTorch asks about the operands of omniq's Triton kernels, and how often it asks Triton."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import traced
from generated_cuda import generate
from torch import nn

from omniq_compile.compiling import kernel_accesses
from omniq_compile.inspector import absent_gpu
from omniq_compile.lowering.target import Target

pytest.importorskip("triton")
wrap = pytest.importorskip("torch._higher_order_ops.triton_kernel_wrap")

no_gpu = pytest.mark.skipif(
    absent_gpu.why_not(Target.parse("cuda:sm_90")) is not None, reason="no code for absent GPUs"
)


def layers(count: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(256, 256, dtype=torch.bfloat16) for _ in range(count)))


def program(model: nn.Module, variant: str) -> str:
    x = torch.randn(48, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        ((graph, values),) = traced(model.requires_grad_(False), x)
        return generate(graph, values, variant, "cuda:sm_90").program


def code(text: str) -> list[str]:
    """Return a program's lines without comments, which number what PyTorch has traced."""
    return [line for line in text.splitlines() if not line.lstrip().startswith("#")]


@no_gpu
@pytest.mark.parametrize("variant", ["int8", "mxfp4"])
def test_triton_is_asked_as_often_for_six_layers_as_for_one(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_accesses.remember()
    asked = []
    ask = wrap.generate_ttir

    def counted(*args: Any) -> Any:
        asked.append(args)
        return ask(*args)

    counts = []
    for model in (layers(1), layers(6)):
        with monkeypatch.context() as patch:
            patch.setattr(wrap, "generate_ttir", counted)
            for name in kernel_accesses._QUESTIONS:  # without what earlier tests made known
                if question := getattr(wrap, name, None):
                    patch.setattr(wrap, name, kernel_accesses._remembering(question.__wrapped__))
            asked.clear()
            text = program(model, variant)
            counts.append(len(asked))
        assert len(re.findall(r"gemm_\d+\.run\(", text)) == len(model)
    assert 0 < counts[0] == counts[1] <= 4


@no_gpu
def test_a_program_is_the_same_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_accesses.remember()
    model = layers(3)
    found = code(program(model, "int8"))
    for name in kernel_accesses._QUESTIONS:
        if question := getattr(wrap, name, None):
            monkeypatch.setattr(wrap, name, question.__wrapped__)
    assert found == code(program(model, "int8"))
    assert "row_scaled_gemm" in "".join(found)


def test_only_what_cannot_differ_is_remembered() -> None:
    asked = []

    def ask(kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any) -> list[str]:
        asked.append(kwargs)
        return ["out_ptr"]

    def kernel(module: str | None, wrapped: bool = True) -> Any:
        function = type("function", (), {"__module__": module})
        jitted = type("jitted", (), {"fn": function})
        return type("autotuned", (), {"fn": jitted}) if wrapped else jitted

    def of_inductor(value: Any) -> Any:
        boxed = type("box", (), {"get_dtype": lambda self: value.dtype})()
        return boxed if isinstance(value, torch.Tensor) else value

    own = kernel("omniq_compile.lowering.triton_kernels.row_scaled_gemm")
    question = kernel_accesses._remembering(ask)
    real, codes = torch.empty(3), torch.empty(3, dtype=torch.int8)
    for number, kwargs in enumerate(
        [
            {"out_ptr": real, "M": 4, "INTEGER": True},
            {"out_ptr": codes, "M": 4, "INTEGER": True},
            {"out_ptr": None, "M": 4, "INTEGER": True},
            {"out_ptr": real, "M": 5, "INTEGER": True},
            {"out_ptr": real, "M": 4, "INTEGER": False},
            {"out_ptr": real, "M": 4, "INTEGER": 1},
            {"out_ptr": real, "M": 4, "INTEGER": 0.5},
            {"out_ptr": real, "M": 4, "INTEGER": 0.25},
            {"out_ptr": real, "M": 4, "INTEGER": "tf32"},
            {"out_ptr": real, "M": 4, "INTEGER": "ieee"},
            {"in_ptr": real, "M": 4, "INTEGER": True},
            {"out_ptr": real, "M": [], "INTEGER": True},  # a symbolic size has no hash either
        ]
    ):
        again = {name: of_inductor(value) for name, value in reversed(kwargs.items())}
        first, second = question(own, kwargs, {}), question(own, again, {})
        assert len(asked) == number + 1
        assert first == second == ["out_ptr"]
        first.clear()
        assert question(own, kwargs, {}) == ["out_ptr"]
    asked.clear()
    question(kernel("omniq_compile.lowering.triton_kernels.quantize"), kwargs, {})
    assert len(asked) == 1
    asked.clear()
    for module in ("somewhere", "omniq_compile.lowering.ops", None):  # the last as exec makes some
        for wrapped in (True, False):
            other = kernel(module, wrapped)
            question(other, {"out_ptr": real}, {})
            question(other, {"out_ptr": real}, {})
    question(own, {"out_ptr": real}, {"out_ptr": "a descriptor"})
    question(own, {"out_ptr": real}, {"out_ptr": "a descriptor"})
    assert len(asked) == 14
