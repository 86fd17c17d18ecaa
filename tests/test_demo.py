"""The digits example: its folder, and the demo from its command line."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

DIGITS = Path(__file__).parent.parent / "examples" / "digits"


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DIGITS / "demo.py"), *arguments]
    narrow = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=narrow
    )


def test_the_pipeline_folder_is_small_bfloat16_and_of_diffusers_class() -> None:
    folder = DIGITS / "pipeline"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (weights,) = (folder / "transformer").glob("*.safetensors")
    assert weights.stat().st_size < 6_000_000
    with safe_open(weights, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_demo_draws_and_counts(tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    ran = demo("--method", "int8", "--out", str(tmp_path), "--samples", "1", "--skip-bench")
    assert ran.returncode == 0, ran.stderr
    picture = plt.imread(tmp_path / "digits_int8.png")
    assert picture[..., :3].std() > 0.05
    for words in ("worst", "rewritten", "10 of 10", "4,920,348", "2,622,492", "56"):
        assert words in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--method", "int9"), "invalid choice: 'int9'"), (("--samples", "0"), "at least 1")],
)
def test_wrong_arguments_say_what_is_wrong(
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: what a new one imports first takes seconds."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DIGITS)
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(DIGITS / "demo.py"), run_name="__main__")
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
