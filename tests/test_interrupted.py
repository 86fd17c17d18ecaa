"""`omniq quantize` cut short for real: killed half-way, and refused by the file system."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import omniq_compile as omniq
from omniq_compile import QuantizedTensor
from omniq_compile.cli import main

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "pipeline"
INT8 = '{"transformer": {"method": "int8", "min_features": 64}}'
COMMAND = "from omniq_compile.cli import main; raise SystemExit(main({arguments!r}))"


def arguments(out: Path) -> list[str]:
    return ["quantize", str(DIGITS), "--quantization", INT8, "--out", str(out)]


def check_a_new_run_works(out: Path) -> None:
    assert main(arguments(out)) == 0
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    model = omniq.load_model(out / "transformer")
    assert any(isinstance(p, QuantizedTensor) for p in model.parameters())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_kill_half_way_leaves_no_checkpoint_and_a_new_run_works(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = COMMAND.format(arguments=arguments(out))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / ".out.partial").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / ".out.partial").exists()
    check_a_new_run_works(out)


def test_an_interrupt_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt  # as Ctrl-C does, while it copies what is not quantized

    monkeypatch.setattr("shutil.copytree", interrupted)
    assert main(arguments(tmp_path / "out")) == 130
    assert capsys.readouterr().err == "omniq quantize: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Make writing fail as a full disk does, after some of it went out; in this whole process."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on this system")
def test_a_write_that_the_system_refuses_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with files_of_at_most(1 << 20):
        assert main(arguments(out)) == 2
    assert "cannot write" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    check_a_new_run_works(out)
