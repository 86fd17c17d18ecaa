"""`omniq bench --suite --jobs`: programs that other processes compile before a suite times them."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._dynamo.utils import counters

from omniq_compile.benchmark import ahead as ahead_module
from omniq_compile.benchmark import suite_runner
from omniq_compile.benchmark.ahead import compile_ahead
from omniq_compile.benchmark.gemm import linear_shapes
from omniq_compile.benchmark.measure import run_bench
from omniq_compile.benchmark.result import BASELINE
from omniq_compile.benchmark.suite_runner import config_of, shapes_of
from omniq_compile.benchmark.suites import SUITES, Case, Suite
from omniq_compile.benchmark.variants import Variant, named, suite_variants
from omniq_compile.cli import main
from omniq_compile.models.random_models import make_inputs, random_model

GOOD = Case("good", "QwenImageTransformer2DModel", 16, 8, width=64)
BAD = replace(GOOD, name="bad", width=65)
TINY = Suite("tiny", "cpu", rounds=1, warmup=1, peak_size=64, gemm_calls=2, cases=(GOOD, BAD))
VARIANTS = named(suite_variants(), [BASELINE, "omniq int8"])


@pytest.mark.parametrize("case", SUITES["smoke"].cases, ids=lambda case: case.name)
def test_shapes_are_those_of_a_call(case: Case) -> None:
    model = random_model(case.model, width=case.width, num_blocks=1)
    inputs = make_inputs(model, image_tokens=case.image_tokens, text_tokens=case.text_tokens)
    with torch.no_grad():
        expected = linear_shapes(model, lambda: model(**inputs))
    assert shapes_of(config_of(SUITES["smoke"], case)) == expected
    assert sum(expected.values()) > 9


def test_each_program_is_compiled_and_each_mistake_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    gemms: list[Any] = []

    def build(name: str) -> Any:
        def call(model: nn.Module, inputs: Any) -> Any:
            if name == "broken":
                raise RuntimeError("out of luck")
            return lambda **given: called.append(name) or model(**given)

        return call

    options = {"method": "int8"}
    variants = [Variant("plain", build("plain")), Variant("broken", build("broken"))]
    variants.append(Variant("omniq", build("omniq"), options))
    monkeypatch.setattr(ahead_module, "suite_variants", lambda: variants)
    monkeypatch.setattr(ahead_module, "compile_gemms", lambda *args: gemms.append(args))
    assert [ahead_module._compile(TINY, GOOD, v.name) for v in variants] == [
        None, "good, broken: RuntimeError: out of luck", None
    ]  # fmt: skip
    assert called == ["plain", "omniq"]
    assert gemms == [(shapes_of(config_of(TINY, GOOD)), options, "cpu")]


def test_other_processes_answer_for_every_program() -> None:
    errors = compile_ahead(TINY, [BAD], VARIANTS, jobs=2)
    assert [error.partition(": ")[0] for error in errors] == [f"bad, {v.name}" for v in VARIANTS]
    assert all("width 65" in error for error in errors)


def test_the_command_compiles_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []

    def ahead(suite: Suite, cases: Any, variants: Any, jobs: int) -> list[str]:
        order.append(([case.name for case in cases], [v.name for v in variants], jobs))
        return ["good, omniq int8: RuntimeError: out of [luck]"]

    def run(suite: Any, case: Case, *more: Any) -> Any:
        order.append(case.name)
        return suite_runner.CaseResult(case.name)

    monkeypatch.setitem(SUITES, "tiny", TINY)
    monkeypatch.setattr(ahead_module, "compile_ahead", ahead)
    monkeypatch.setattr(suite_runner, "_run_case", run)
    console = Console(file=io.StringIO(), width=200)
    names = [v.name for v in VARIANTS]
    assert suite_runner.run_command("tiny", None, console, "goo", names, jobs=3) == 0
    assert order == [(["good"], names, 3), "good"]
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "not compiled ahead: good, omniq int8: RuntimeError: out of [luck]" in said
    order.clear()
    assert main(["bench", "--suite", "tiny", "--case", "good", "--variant", BASELINE]) == 0
    assert order == ["good"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "2"], "--jobs is for a suite"),
        (["--suite", "smoke", "--jobs", "2", "--case", "ugly"], "no case of suite 'smoke'"),
        pytest.param(
            ["--suite", "h200", "--jobs", "2"], "device 'cuda': this PyTorch sees none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it would be measured"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_first(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", errors := io.StringIO())
    assert main(["bench", *arguments]) == 2
    assert said in errors.getvalue()


def test_a_number_of_processes_is_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--suite", "smoke", "--jobs", "0"])
    assert stopped.value.code == 2
    assert "--jobs: 0 is less than 1" in capsys.readouterr().err


@pytest.mark.zoo
def test_first_calls_find_what_was_compiled(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert not compile_ahead(TINY, [GOOD], VARIANTS, jobs=2)
    counters.clear()
    result = run_bench(config_of(TINY, GOOD), Console(file=io.StringIO()), VARIANTS)
    assert not result.failed
    assert counters["inductor"]["fxgraph_cache_hit"] >= len(VARIANTS)
    assert not counters["inductor"]["fxgraph_cache_miss"]
