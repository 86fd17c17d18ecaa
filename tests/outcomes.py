"""Writes down the outcome of each test once it is known: a lent machine may go back mid-run."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
import triton


class Outcomes:
    """A plugin that writes a line for each test: its outcome, seconds, name, and what was wrong."""

    def __init__(self, file: Path) -> None:
        self.file = file
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        versions = f"torch {torch.__version__}, Triton {triton.__version__}"
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{now}, {device}, {versions}, Python {platform.python_version()}\n\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # That a test was set up, and cleared away, says nothing.
        if report.when != "call" and report.passed:
            return
        words = [report.outcome, f"{report.duration:.1f} s", report.nodeid]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            words.append(str(crash.message if crash else report.longrepr).partition("\n")[0])
        with self.file.open("a") as lines:
            lines.write("  ".join(words) + "\n")
