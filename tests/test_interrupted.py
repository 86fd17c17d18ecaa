"""`omniq quantize` cut short for real: killed half-way, and refused by the file system."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import omniq_compile as omniq
from omniq_compile import QuantizedTensor

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "pipeline"
INT8 = '{"transformer": {"method": "int8", "min_features": 64}}'
COMMAND = "from omniq_compile.cli import main; raise SystemExit(main({arguments!r}))"
# What a file may grow to, which makes writing fail as a full disk does: after some of it went out.
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "


def quantize(out: Path, before: str = "") -> subprocess.Popen[str]:
    arguments = ["quantize", str(DIGITS), "--quantization", INT8, "--out", str(out)]
    code = before + COMMAND.format(arguments=arguments)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def check_a_new_run_works(out: Path) -> None:
    process = quantize(out)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    model = omniq.load_model(out / "transformer")
    assert any(isinstance(p, QuantizedTensor) for p in model.parameters())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_kill_half_way_leaves_no_checkpoint_and_a_new_run_works(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = quantize(out)
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


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on this system")
def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = quantize(out, LIMITED)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2, said
    assert "cannot write" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
    check_a_new_run_works(out)
