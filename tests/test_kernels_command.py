"""``omniq kernels``: every cell of the table, and the reasons of one target."""

from __future__ import annotations

import pytest
import torch

from omniq_compile import kernel_table
from omniq_compile.cli import main
from omniq_compile.kernel_table import kernels
from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.schemes import METHODS
from omniq_compile.lowering.target import ARCHITECTURES, Target


@pytest.mark.parametrize("here", ARCHITECTURES["cpu"])
def test_every_cell_has_a_kind(
    here: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Target("cpu", here)
    monkeypatch.setattr(kernel_table, "present", lambda device: machine)
    assert main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["target", *METHODS] in [line.split() for line in lines]  # in 80 characters, whole
    for device, archs in ARCHITECTURES.items():
        for arch in archs:
            (line,) = [line for line in lines if line.split()[:1] == [f"{device}:{arch}"]]
            kinds = [word for word in line.split()[1:] if word != "*"]
            assert len(kinds) == len(METHODS)
            assert set(kinds) <= {"native", "emulated"}
    assert any(line.split()[:2] == [str(machine), "*"] for line in lines)


def test_one_target_shows_every_kernel_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--target", "npu:ascend950"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    rows = [row for row in kernels() if row.target == "npu:ascend950"]
    assert len(rows) > len(METHODS)
    for row in rows:
        assert f"{'native' if row.native else 'emulated'} {row.kernel} {row.about}" in out
    assert "rocm" not in out


def test_an_unknown_target_names_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--target", "cuda:sm_91"]) == 2
    assert "Did you mean 'sm_90'?" in capsys.readouterr().err


def test_a_gpu_without_kernels_does_not_keep_the_table_from_being_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    assert main(["kernels"]) == 0
    assert "cuda:sm_80" in capsys.readouterr().out
    assert not any(row.here for row in kernels() if row.target.startswith("cuda"))
    with pytest.raises(OptionError, match=r"no kernels for .*7\.5"):
        Target.parse("cuda")
