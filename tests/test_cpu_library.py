"""C++ of ours: built beside what else a first call does, and replaced where that fails."""

from __future__ import annotations

import logging
import re
import subprocess
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler

from omniq_compile.lowering.cpu import library
from omniq_compile.lowering.cpu import quantize as on_cpu
from omniq_compile.lowering.target import detect

Submit = Callable[..., "Future[Any]"]


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_started", set())


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Future[Any]]:
    """What was given to the threads that build."""
    futures = []
    submit = library._builders().submit

    def record(task: Callable[[], Any]) -> Future[Any]:
        futures.append(submit(task))
        return futures[-1]

    monkeypatch.setattr(library._builders(), "submit", record)
    return futures


def give_source(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let every name stand for C++ that no cache folder has."""
    source = f"// {uuid.uuid4()}\n{code}"
    monkeypatch.setattr(library, "read", lambda file: source)


def test_what_was_started_is_loaded(
    monkeypatch: pytest.MonkeyPatch, submitted: list[Future[Any]]
) -> None:
    give_source(monkeypatch, 'extern "C" int seven() { return 7; }')
    library.start("new")
    (future,) = submitted
    built = library.load("new")
    assert future.done()
    assert built is not None
    assert built.seven() == 7
    library.start("new")
    assert library.load("new") is built
    assert submitted == [future]


def test_what_lies_in_the_cache_is_not_built(
    monkeypatch: pytest.MonkeyPatch, submitted: list[Future[Any]]
) -> None:
    give_source(monkeypatch, 'extern "C" int seven() { return 7; }')
    assert library.load("new") is not None
    monkeypatch.setattr(library, "_loaded", {})
    library.start("new")
    assert library._started == {"new"}
    assert library.load("new") is not None
    assert submitted == []


def test_many_layers_start_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask Inductor's cache takes milliseconds."""
    asked = []
    monkeypatch.setattr(library, "_begin", lambda source, submit: asked.append(source))
    for _ in range(3):
        library.start("decode")
        library.start("quantize")
    assert len(asked) == 2


def test_a_thread_builds_by_the_settings_of_the_one_that_asked(
    monkeypatch: pytest.MonkeyPatch, submitted: list[Future[Any]], tmp_path: Path
) -> None:
    """PyTorch's settings differ from thread to thread."""
    calls, compiler = tmp_path / "calls", tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {get_cpp_compiler()} "$@"\n')
    compiler.chmod(0o755)
    give_source(monkeypatch, 'extern "C" int seven() { return 7; }')
    with torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}):
        library.start("new")
        submitted[0].result()
        built = [line for line in calls.read_text().splitlines() if " -shared " in line]
        assert library.load("new") is not None
    assert len(built) == 1
    assert [line for line in calls.read_text().splitlines() if " -shared " in line] == built


def test_a_failed_build_is_said_once_and_by_load(
    monkeypatch: pytest.MonkeyPatch,
    submitted: list[Future[Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    give_source(monkeypatch, "this is no C++")
    with caplog.at_level(logging.WARNING, "omniq"):
        library.start("new")
        assert submitted[0].exception() is not None
        assert caplog.records == []
        assert library.load("new") is None
        assert library.load("new") is None
    (record,) = caplog.records
    assert "new.cpp could not be built" in record.getMessage()
    assert "C++ compile error." in record.getMessage()


def test_a_cache_that_cannot_be_used_is_said_by_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def begin(source: str, submit: Submit | None = None) -> Any:
        raise PermissionError("no folder")

    monkeypatch.setattr(library, "_begin", begin)
    with caplog.at_level(logging.WARNING, "omniq"):
        library.start("decode")
        assert library.load("decode") is None
    assert ["decode.cpp could not be built" in r.getMessage() for r in caplog.records] == [True]


@pytest.mark.parametrize(
    ("method", "features", "wanted"),
    [
        ("int8", 48, set()),
        ("int8", 2112, {"quantize"}),
        ("mxfp4", 48, {"quantize", "GEMM"}),
        ("fp8", 48, {"quantize", "GEMM"}),
    ],
)
def test_a_first_call_starts_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, method: str, features: int, wanted: set[str]
) -> None:
    gemm = "tile_gemm" if detect("cpu").arch == "avx512_bf16" else "decode"
    started = []
    monkeypatch.setattr(library, "start", lambda name: started.append(name))
    layer = torch.nn.Linear(2048, features).to(torch.bfloat16).requires_grad_(False)
    options = {"method": method, "min_features": 1, "compiler": "eager"}
    torch.compile(layer, backend="omniq", options=options)(torch.randn(3, 2048).bfloat16())
    assert set(started) == {gemm if name == "GEMM" else name for name in wanted}
    assert 2048 * 48 < on_cpu.LARGE <= 2048 * 2112


def test_a_kept_layer_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(library, "start", lambda name: started.append(name))
    model = torch.nn.Sequential(torch.nn.Linear(70, 48), torch.nn.Linear(48, 66))
    options = {"method": "mxfp8", "min_features": 60, "compiler": "eager"}
    with torch.no_grad():
        torch.compile(model.bfloat16(), backend="omniq", options=options)(
            torch.randn(3, 70).bfloat16()
        )
    assert started == []


def test_threads_that_load_at_once_get_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    give_source(monkeypatch, 'extern "C" int seven() { return 7; }')
    found = []
    threads = [threading.Thread(target=lambda: found.append(library.load("new"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is not None
    assert {id(each) for each in found} == {id(found[0])}


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("tile_gemm", ["omniq_tile_gemm", "omniq_tile_gemm_supported"]),
        ("decode", ["omniq_decode"]),
        ("quantize", ["omniq_quantize"]),
    ],
)
def test_windows_finds_the_functions_that_python_calls(name: str, functions: list[str]) -> None:
    """Its libraries export what says so alone; preprocessed without the headers of a system."""
    source = re.sub(r"^#include.*$", "", library.read(f"{name}.cpp"), flags=re.M)
    command = [get_cpp_compiler(), "-x", "c++", "-E", "-P", "-D_WIN32", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=True)
    found = re.findall(r'extern "C" __declspec\(dllexport\) int (\w+)\(', done.stdout)
    assert sorted(found) == functions
