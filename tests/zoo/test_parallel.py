"""Models that diffusers spreads over processes: tensor parallelism, and context parallelism."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(
        Version(diffusers.__version__) < Version("0.42"), reason="has no tensor parallelism"
    ),
]


# All layers of the model, and those of the block that it repeats.
@pytest.mark.parametrize(("way", "layers"), [("whole", 42), ("blocks", 14)])
@pytest.mark.parametrize("kind", ["tensor", "context"])
def test_both_processes_are_near_what_one_alone_computes(
    kind: str, way: str, layers: int, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("parallel_process.py")
    arguments = [sys.executable, str(script), kind, way, str(tmp_path / "meeting")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*arguments, str(rank)], env=environment, stdout=-1, text=True)
        for rank in range(2)
    ]
    results = []
    for process in processes:
        lines = process.communicate(timeout=300)[0].splitlines()
        results += [line.split()[1:] for line in lines if line.startswith("result ")]
    assert len(results) == 2
    for error, sites, kept in results:
        assert 0 < float(error) < 0.03
        assert (int(sites), int(kept)) == (layers, 0)
