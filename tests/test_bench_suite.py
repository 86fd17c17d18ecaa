"""`omniq bench --suite`: the same code as on a GPU, with variants that need no C++ compiler."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from omniq_compile.benchmark import gemm, suite_runner
from omniq_compile.benchmark.gemm import gemm_rate, linear_shapes, measure_peaks
from omniq_compile.benchmark.machine import Timing
from omniq_compile.benchmark.markdown import COLUMNS, markdown
from omniq_compile.benchmark.result import BASELINE
from omniq_compile.benchmark.suite_runner import SuiteResult, run_suite
from omniq_compile.benchmark.suites import SUITES, Case, Suite
from omniq_compile.benchmark.variants import Variant, suite_variants
from omniq_compile.cli import main
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.models.families import FAMILIES
from omniq_compile.passes.config import QuantConfig
from omniq_compile.quantize_weights import quantize_

INT8 = {"method": "int8", "min_features": 32, "compiler": "eager"}


def omniq(model: nn.Module, inputs: Any) -> Any:
    quantize_(model, INT8)
    return torch.compile(model, backend="omniq", options=INT8)


def broken(model: nn.Module, inputs: Any) -> Any:
    raise RuntimeError("out of | luck\n\nmuch advice")


VARIANTS = [
    Variant(BASELINE, lambda model, inputs: model),
    Variant("broken", broken),
    Variant("omniq int8", omniq, INT8),
]
TINY = Suite(
    about="tiny", device="cpu", rounds=2, warmup=1, peak_size=64, gemm_calls=2,
    cases=(
        Case("good", "QwenImageTransformer2DModel", 16, 8, width=64),
        Case("bad", "QwenImageTransformer2DModel", 16, 8, width=65),
    ),
)  # fmt: skip


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def result() -> SuiteResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "tiny", TINY)
        return run_suite("tiny", console(), VARIANTS, compiler="eager", command="omniq bench")


def test_one_failure_leaves_the_rest_measured(result: SuiteResult) -> None:
    good, bad = result.cases
    assert "width 65" in str(bad.error)
    assert good.bench is not None
    base, failed, fast = good.bench.measurements
    assert "out of | luck" in str(failed.error)
    assert len(base.seconds) == len(fast.seconds) == 2
    assert 0 < (fast.error_to_eager or 0) < 0.1
    assert (fast.weight_bytes or 0) < 0.7 * (base.weight_bytes or 0)
    assert result.failed


def test_gemms_are_shares_of_the_peak(result: SuiteResult) -> None:
    gemms = result.cases[0].gemms
    assert list(gemms) == [BASELINE, "omniq int8"]
    peaks = {p.dtype: p.rate for p in result.peaks}
    for rate in gemms.values():
        assert rate.share == pytest.approx(rate.rate / peaks[rate.peak])
    assert gemms[BASELINE].peak == "bfloat16"
    assert gemms["omniq int8"].kernels[0].startswith("cpu_s8")


def test_json_and_markdown_hold_every_figure(result: SuiteResult) -> None:
    data = json.loads(result.to_json())
    good = data["cases"][0]
    assert good["bench"]["summary"]["omniq int8"]["median_seconds"] > 0
    assert data["environment"]["torch"] == torch.__version__
    page = markdown(result)
    rows = [line for line in page.splitlines() if line.startswith("| omniq int8")]
    assert len(rows) == 1
    assert rows[0].count("|") == len(COLUMNS) + 1
    assert "broken failed: RuntimeError: out of | luck" in page
    assert "advice" not in page
    assert "Failed: OmniqError: width 65" in page
    assert "`omniq bench`" in page


def test_gemms_of_a_gpu_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that are captured are those that one replay stands for."""
    log: list[str] = []

    @contextmanager
    def entered(name: Any) -> Iterator[None]:
        log.append(f"{name} begins")
        yield
        log.append(f"{name} ends")

    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"CUDAGraph": lambda: graph, "graph": lambda graph: entered("capture"),
             "Stream": lambda: stream, "current_stream": lambda: stream,
             "stream": lambda stream: entered("warm-up")}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gemm, "time_calls", lambda run, device: Timing(run() or 3.0, None))
    seconds = gemm._seconds(lambda: log.append("call"), replace(TINY, device="cuda"))
    calls = ["call"] * TINY.gemm_calls
    assert log[: -2 * gemm.REPEATS] == [
        "warm-up begins", *calls, "warm-up ends", "capture begins", *calls, "capture ends"
    ]  # fmt: skip
    assert log[-2 * gemm.REPEATS :] == ["replay"] * 2 * gemm.REPEATS
    assert seconds == 3.0 / TINY.gemm_calls


def test_only_linears_that_matter_are_timed() -> None:
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 300), nn.Linear(300, 1))
    shapes = linear_shapes(model, lambda: model(torch.randn(2, 5, 300)))
    assert shapes == {(10, 200, 300): 1, (10, 300, 200): 1}
    assert not model[0]._forward_hooks


def test_a_precision_without_a_gemm_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("needs compute capability 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    bfloat16, fp8, int8 = measure_peaks(TINY)
    assert (bfloat16.rate or 0) > 0
    assert (int8.rate or 0) > 0
    assert (fp8.rate, fp8.error) == (None, "RuntimeError: needs compute capability 8.9")
    monkeypatch.setitem(gemm.PEAK_OF, "int8", "fp8")
    shapes = linear_shapes(nn.Linear(64, 40), lambda: None)
    assert not shapes
    model = nn.Linear(64, 40)
    shapes = linear_shapes(model, lambda: model(torch.randn(9, 64)))
    rate = gemm_rate(shapes, INT8, TINY, [bfloat16, fp8, int8], "eager")
    assert (rate.share is None) == (rate.peak == "fp8")


def test_every_suite_can_be_built() -> None:
    for suite in SUITES.values():
        assert {case.model for case in suite.cases} <= set(FAMILIES)
        assert len({case.name for case in suite.cases}) == len(suite.cases)
    names = [v.name for v in suite_variants()]
    assert names[0] == BASELINE
    for variant in suite_variants():
        if variant.options is not None:
            QuantConfig.from_options(variant.options)


def test_the_command_writes_a_page_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: SuiteResult
) -> None:
    def run(*args: Any, keep: Any, **kwargs: Any) -> SuiteResult:
        keep(result)
        return result

    monkeypatch.setattr(suite_runner, "run_suite", run)
    assert main(["bench", "--suite", "tiny", "--report", str(tmp_path)]) == 1
    page, data = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (page.suffix, data.suffix) == (".md", ".json")
    assert page.stem == data.stem
    assert page.stem.startswith(result.environment["date"][:10])
    assert page.read_text() == markdown(result)
    assert json.loads(data.read_text()) == json.loads(result.to_json())


def test_variants_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[str]] = []

    def run(suite: Any, case: Case, variants: list[Variant], *more: Any) -> Any:
        measured.append([variant.name for variant in variants])
        return suite_runner.CaseResult(case.name)

    monkeypatch.setitem(SUITES, "tiny", TINY)
    monkeypatch.setattr(suite_runner, "_run_case", run)
    chosen = ["--variant", "omniq fp8", "--variant", BASELINE]
    assert main(["bench", "--suite", "tiny", "--case", "good", *chosen]) == 0
    assert measured == [[BASELINE, "omniq fp8"]]
    monkeypatch.setattr(sys, "stderr", errors := io.StringIO())
    assert main(["bench", "--suite", "tiny", "--variant", "omniq fp9"]) == 2
    assert "Did you mean 'omniq fp8'?" in errors.getvalue()
    assert main(["bench", "--variant", "omniq fp8"]) == 2
    assert "--variant is for a suite" in errors.getvalue()


def test_one_case_is_measured_and_kept_when_the_next_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(suite: Any, case: Case, *more: Any) -> Any:
        if case.name == "bad":
            raise KeyboardInterrupt
        return suite_runner.CaseResult(case.name)

    monkeypatch.setitem(SUITES, "tiny", TINY)
    monkeypatch.setattr(suite_runner, "_run_case", stop)
    tmp_path /= "a/new/folder"
    arguments = ["bench", "--suite", "tiny", "--report", str(tmp_path)]
    assert main([*arguments, "--case", "goo"]) == 0
    (alone,) = tmp_path.glob("*-goo.json")
    assert main(arguments) == 130  # as a shell reports an interrupt
    (stopped,) = set(tmp_path.glob("*.json")) - {alone}
    for file in (alone, stopped):
        assert [case["name"] for case in json.loads(file.read_text())["cases"]] == ["good"]
    monkeypatch.setattr(sys, "stderr", errors := io.StringIO())
    assert main([*arguments, "--case", "ugly"]) == 2
    assert "no case of suite 'tiny': 'good', 'bad'" in errors.getvalue()
    assert main(["bench", "--case", "good"]) == 2
    assert "--case is for a suite" in errors.getvalue()


@pytest.mark.parametrize(
    ("name", "report", "said"),
    [
        ("h20", None, "Did you mean 'h200'?"),
        ("smoke", f"{__file__}/folder", "cannot be made a folder (Not a directory)"),
        pytest.param(
            "h200", None, "device 'cuda': this PyTorch sees none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it would be measured"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(name: str, report: str | None, said: str) -> None:
    with pytest.raises(OmniqError) as info:
        suite_runner.run_command(name, Path(report) if report else None, console())
    assert said in str(info.value)
