"""A ``torch_npu`` that records its calls, and computes what the documentation says in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from format_oracle import E2M1, E4M3, decode_e2m1, decode_e4m3, decode_e8m0, mx, pack
from operator_recorder import Recorder
from torch import Tensor


def install(where: str) -> tuple[ModuleType, Recorder]:
    """Make the module for an architecture, and its recorder."""
    recorder = Recorder("torch_npu", where)
    module = ModuleType("torch_npu")
    for name, value in recorder.table["constants"].items():
        setattr(module, name, value)

    def operator(name: str, compute: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = recorder.bind(name, args, kwargs)
            return compute(bound.case, **bound.arguments)

        return call

    for name, compute in OPERATORS.items():
        setattr(module, name, operator(name, compute))
    return module, recorder


def _float64(x: Tensor) -> np.ndarray:
    return x.to(torch.float64).numpy()


def _dynamic_quant(case: str, input: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    real = input.float().numpy()
    scale = np.abs(real).max(-1) / np.float32(127)
    codes = np.rint(real / np.where(scale == 0, np.float32(1), scale)[..., None])
    return torch.from_numpy(codes.astype(np.int8)), torch.from_numpy(scale)


def _in_pairs(scale: np.ndarray) -> Tensor:
    padded = np.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, scale.shape[-1] % 2)])
    return torch.from_numpy(padded.reshape(*scale.shape[:-1], -1, 2))


def _dynamic_mx_quant(case: str, input: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    if case == "e4m3":
        codes, scale, _values = mx(input.float().numpy(), E4M3)
        return torch.from_numpy(codes).view(torch.float8_e4m3fn), _in_pairs(scale)
    codes, scale, _values = mx(input.float().numpy(), E2M1, uos="UOS" in case)
    return torch.from_numpy(pack(codes)), _in_pairs(scale)


def _dynamic_dual_level_mx_quant(
    case: str, input: Tensor, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    real = input.float().numpy()
    K = real.shape[-1]
    runs = np.pad(real, [(0, 0), (0, -K % 512)]).reshape(real.shape[0], -1, 512)
    coarse = np.abs(runs).max(-1) / np.float32(6)
    divisor = np.where(coarse == 0, np.float32(1), coarse)[..., None]
    rounded = torch.from_numpy(runs / divisor).to(input.dtype).flatten(1)[:, :K]
    codes, scale, _values = mx(rounded.float().numpy(), E2M1)
    return torch.from_numpy(pack(codes)), torch.from_numpy(coarse), _in_pairs(scale)


def _format_cast(case: str, self: Tensor, acl_format: int, **_: Any) -> Tensor:
    out = self.clone()
    out.npu_format = acl_format  # type: ignore[attr-defined]
    return out


def _quant_matmul(
    case: str,
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    pertoken_scale: Tensor,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    **_: Any,
) -> Tensor:
    if case.startswith("int8"):
        out = _float64(x1) @ _float64(x2)
        out = out * _float64(pertoken_scale)[:, None] * _float64(scale)
    else:
        a = decode_e2m1(x1) if x1.dtype is torch.uint8 else decode_e4m3(x1)
        b = decode_e2m1(x2.t()) if x2.dtype is torch.uint8 else decode_e4m3(x2.t())
        out = _blocks(a, pertoken_scale) @ _blocks(b, scale.transpose(0, 1)).T
    return _finish(out, bias, output_dtype)


def _dual_level_quant_matmul(
    case: str,
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    bias: Tensor | None,
    output_dtype: torch.dtype,
) -> Tensor:
    a = _blocks(decode_e2m1(x1), x1_level1_scale)
    b = _blocks(decode_e2m1(x2), x2_level1_scale)
    K = a.shape[1]
    a *= np.repeat(_float64(x1_level0_scale), 512, axis=1)[:, :K]
    b *= np.repeat(_float64(x2_level0_scale).T, 512, axis=1)[:, :K]
    return _finish(a @ b.T, bias, output_dtype)


def _blocks(values: np.ndarray, pairs: Tensor) -> np.ndarray:
    """Give each element of ``[rows, K]`` its scale out of ``[rows, ceil(K / 64), 2]``."""
    scale = decode_e8m0(pairs).reshape(values.shape[0], -1)
    return values * np.repeat(scale, 32, axis=1)[:, : values.shape[1]]


def _finish(out: np.ndarray, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(out if bias is None else out + _float64(bias)).to(dtype)


OPERATORS = {
    "npu_dynamic_quant": _dynamic_quant,
    "npu_dynamic_mx_quant": _dynamic_mx_quant,
    "npu_dynamic_dual_level_mx_quant": _dynamic_dual_level_mx_quant,
    "npu_format_cast": _format_cast,
    "npu_quant_matmul": _quant_matmul,
    "npu_dual_level_quant_matmul": _dual_level_quant_matmul,
}
