"""AITER where it is not installed, and where it has nothing to do; test_rocm_xpu has the rest."""

from __future__ import annotations

import sys
from pathlib import Path

import fake_gemms
import pytest
import torch

from omniq_compile.lowering.errors import OmniqError
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.rocm import aiter


def test_no_rows_are_not_given_to_aiter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = fake_gemms.install_aiter(monkeypatch, tmp_path, "gfx950")
    weight = aiter.arrange(get_format("mxfp4").quantize(torch.randn(32, 256)))
    recorder.calls.clear()
    nothing = get_format("mxfp4").quantize(torch.randn(2, 0, 256))
    out = aiter.rocm_gemm_a4w4(*nothing, *weight)
    assert (out.shape, out.dtype, recorder.calls) == ((2, 0, 32), torch.bfloat16, [])


def test_aiter_is_told_from_another_package_of_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert aiter.unusable() == "AITER is not installed"
    with pytest.raises(OmniqError, match="Install amd-aiter"):
        aiter.rocm_gemm_a4w4(*[torch.zeros(32, 32, dtype=torch.uint8)] * 4)


OLD = "the installed AITER is older than gemm_a4w4's argument dtype (December 2025)"


@pytest.mark.parametrize(
    ("takes", "why"),
    [(fake_gemms.AITER_TAKES, None), (fake_gemms.OLD_AITER_TAKES, OLD), ("*args", OLD)],
)
def test_an_aiter_is_asked_for_what_is_called(
    takes: str, why: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_gemms.aiter_folder(tmp_path, takes)
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert aiter.unusable() == why
