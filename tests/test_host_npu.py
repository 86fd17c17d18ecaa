"""Runs tests/host_npu: a device in the host's memory, which libraries take for an Ascend NPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_omniq_runs_on_a_device_that_is_no_gpu() -> None:
    folders = [TESTS, TESTS / "gpu", TESTS / "host_npu"]
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", TESTS / "host_npu" / "run_on_npu.py"],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert " skipped" not in done.stdout
