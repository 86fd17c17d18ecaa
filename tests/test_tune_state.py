"""Which earlier run `omniq tune` goes on from: one of the same pipeline, versions and arguments."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tune import DIGITS, tune

import omniq_compile as omniq
from omniq_compile import OptionError


def measure_one(setting: Any, goal: Any, state: Any, *_: Any, **__: Any) -> None:
    state.put("some layer", [1.0])
    raise OptionError(f"stopped after {state.resumed}")


@pytest.mark.parametrize("out", [".", "tuned"])
def test_a_run_goes_on_in_the_folder_of_its_pipeline(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("omniq_compile.quality.tuning.tune", measure_one)
    shutil.copytree(DIGITS, tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path / "pipeline")
    for resumed in range(2):
        assert tune(Path(out), "--target-psnr", "52", folder=Path(".")) == 2
        assert f"stopped after {resumed}" in capsys.readouterr().err
    (weights,) = Path("transformer").glob("*.safetensors")
    os.utime(weights, (0, 0))
    assert tune(Path(out), "--target-psnr", "52", folder=Path(".")) == 2
    assert "it differs in folder" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "name"), [(omniq, "omniq"), (torch, "torch")])
def test_what_another_version_measured_is_not_taken_over(
    package: Any,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("omniq_compile.quality.tuning.tune", measure_one)
    for resumed in range(2):
        assert tune(tmp_path, "--target-psnr", "52") == 2
        assert f"stopped after {resumed}" in capsys.readouterr().err
    monkeypatch.setattr(package, "__version__", "99.0")
    assert tune(tmp_path, "--target-psnr", "52") == 2
    assert f"is of another run: it differs in {name}. Choose" in capsys.readouterr().err
    assert tune(tmp_path, "--target-psnr", "52", "--restart") == 2
    assert "stopped after 0" in capsys.readouterr().err
