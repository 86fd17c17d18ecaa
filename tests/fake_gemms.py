"""torch's GEMMs and AITER on devices that are not here: recorded, and computed in float64."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from format_oracle import decode_e2m1, decode_e4m3, decode_e8m0
from operator_recorder import Recorder
from torch import Tensor

from omniq_compile.lowering import rocm


def without_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave AMD's GPUs the kernels of others, whatever omniq's own are preferred to."""
    others = tuple(k for k in rocm.KERNELS if "triton" not in k.name)
    monkeypatch.setattr(rocm, "KERNELS", others)


def install_torch(monkeypatch: pytest.MonkeyPatch, where: str) -> Recorder:
    """Let ``torch._scaled_mm`` and ``torch._int_mm`` be those of an architecture."""
    recorder = Recorder("torch", where)
    for name, compute in (("_scaled_mm", scaled_mm), ("_int_mm", _int_mm)):
        monkeypatch.setattr(torch, name, _operator(recorder, name, compute))
    return recorder


# What gemm_a4w4 takes in github.com/ROCm/aiter today, and what it took until December 2025.
AITER_TAKES = "A, B, A_scale, B_scale, bias=None, dtype=15, alpha=1.0, beta=0.0, bpreshuffle=True"
OLD_AITER_TAKES = "A, B, A_scale, B_scale, out, bias=None, alpha=1.0, beta=0.0, bpreshuffle=True"


def aiter_folder(folder: Path, takes: str = AITER_TAKES) -> None:
    """Write the file that an AITER is known by."""
    (folder / "aiter" / "ops").mkdir(parents=True)
    (folder / "aiter" / "__init__.py").write_text("raise RuntimeError('imported')")
    operator = f"import torch\n\n\ndef gemm_a4w4({takes}): ...\n"
    (folder / "aiter" / "ops" / "gemm_op_a4w4.py").write_text(operator)


def install_aiter(monkeypatch: pytest.MonkeyPatch, folder: Path, where: str) -> Recorder:
    """Put an AITER into ``sys.modules``, and the file that it is known by into ``folder``."""
    recorder = Recorder("aiter", where)
    aiter_folder(folder)
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    monkeypatch.syspath_prepend(str(folder))
    for module, name, compute in (
        ("aiter", "gemm_a4w4", _gemm_a4w4),
        ("aiter.ops.shuffle", "shuffle_weight", _shuffle_weight),
        ("aiter.utility.fp4_utils", "e8m0_shuffle", _e8m0_shuffle),
    ):
        fake = ModuleType(module)
        setattr(fake, name, _operator(recorder, name, compute))
        fake.__spec__ = find_spec("aiter")
        monkeypatch.setitem(sys.modules, module, fake)
    return recorder


def _operator(recorder: Recorder, name: str, compute: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        bound = recorder.bind(name, args, kwargs)
        result: Tensor = compute(**bound.arguments)
        return result

    return call


def _values(codes: Tensor) -> np.ndarray:
    is_e2m1 = codes.dtype is torch.float4_e2m1fn_x2
    return decode_e2m1(codes) if is_e2m1 else decode_e4m3(codes)


def scaled_mm(
    self: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    **_: Any,
) -> Tensor:
    a, b = _values(self), _values(mat2.t())
    if scale_a.dtype is torch.float32:
        out = (a * scale_a.double().numpy()) @ (b * scale_b.t().double().numpy()).T
    else:
        out = _blocks(a, scale_a) @ _blocks(b, scale_b).T
    if bias is not None:
        out = out + bias.double().numpy()
    return torch.from_numpy(out).to(out_dtype)


def _blocks(values: np.ndarray, scale: Tensor) -> np.ndarray:
    """Give each element of ``[rows, K]`` its scale; rows beyond are padding."""
    rows, K = values.shape
    return values * np.repeat(decode_e8m0(scale).reshape(-1, K // 32)[:rows], 32, axis=1)


def _int_mm(self: Tensor, mat2: Tensor) -> Tensor:
    return (self.double() @ mat2.double()).to(torch.int32)


def _shuffle_weight(x: Tensor, **_: Any) -> Tensor:
    rows, columns = x.shape
    tiles = x.view(torch.uint8).view(rows // 16, 16, columns // 32, 2, 16)
    return tiles.permute(0, 2, 3, 1, 4).contiguous().view(rows, columns).view(x.dtype)


def _e8m0_shuffle(scale: Tensor) -> Tensor:
    rows, columns = scale.shape
    # What AITER leaves as it finds it: here a NaN, which would be seen if it were read.
    padded = torch.full((-(-rows // 256) * 256, -(-columns // 8) * 8), 255, dtype=torch.uint8)
    padded[:rows, :columns] = scale.view(torch.uint8)
    tiles = padded.view(padded.shape[0] // 32, 2, 16, padded.shape[1] // 8, 2, 4)
    return tiles.permute(0, 3, 5, 2, 4, 1).contiguous().view(padded.shape).view(scale.dtype)


def _gemm_a4w4(A: Tensor, B: Tensor, A_scale: Tensor, B_scale: Tensor, **_: Any) -> Tensor:
    assert A.is_contiguous()
    rows, columns = B.shape
    tiles = B.view(torch.uint8).view(rows // 16, columns // 32, 2, 16, 16)
    weight = tiles.permute(0, 3, 1, 2, 4).reshape(rows, columns)
    left = _blocks(decode_e2m1(A), _plain(A_scale))
    return torch.from_numpy(left @ _blocks(decode_e2m1(weight), _plain(B_scale)).T).bfloat16()


def _plain(scale: Tensor) -> Tensor:
    """Undo `_e8m0_shuffle`, but for its padding."""
    rows, columns = scale.shape
    tiles = scale.view(torch.uint8).view(rows // 32, columns // 8, 4, 16, 2, 2)
    return tiles.permute(0, 5, 3, 1, 4, 2).reshape(rows, columns)
