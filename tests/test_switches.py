"""A layer that `omniq tune` switches on: one kernel for each size that it is called with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import dequantized, error
from torch import nn

from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.lowering.schemes import get_scheme
from omniq_compile.lowering.target import Target
from omniq_compile.quality import switches

Linear = Callable[[torch.Tensor], torch.Tensor]


def switched(layer: nn.Linear, method: str, target: str) -> Linear:
    scheme = get_scheme(method)
    weight = QuantizedTensor.from_weight(layer.weight, scheme.weight, method)
    return switches._quantized_linear(layer, weight, scheme, Target.parse(target))


def exact(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return dequantized(x) @ dequantized(layer.weight).T + layer.bias.double()


def test_a_kernel_is_not_called_with_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, rows, found = torch._int_mm, [], importlib.util.find_spec

    def of_a_gpu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """What aten/src/ATen/native/cuda/Blas.cpp checks, and cuBLASLt."""
        assert a.shape[0] > 16, "self.size(0) needs to be greater than 16"
        assert a.stride()[1] == 1, "CUBLAS_STATUS_NOT_SUPPORTED"
        rows.append(a.shape[0])
        return multiply(a, b)

    monkeypatch.setattr(torch, "_int_mm", of_a_gpu)
    # Where Triton is missing, few rows go to a kernel that runs anywhere.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else found(name)
    )
    layer = nn.Linear(48, 64).requires_grad_(False)
    forward = switched(layer, "int8", "cuda:sm_100")
    for tokens in (1024, 1, 17, 16, 1024):
        x = torch.randn(1, tokens, 48)
        assert error(forward(x), exact(layer, x)) < 5e-7
    channels = torch.randn(1, 48, 25).transpose(1, 2)
    assert error(forward(channels), exact(layer, channels)) < 5e-7
    assert rows == [1024, 17, 1024, 25]


def test_the_result_has_the_dtype_of_each_call() -> None:
    layer = nn.Linear(48, 64).requires_grad_(False)
    forward = switched(layer, "int8", "cpu:generic")
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        x = torch.randn(7, 48).to(dtype)
        out = forward(x)
        assert out.dtype is dtype
        assert error(out, exact(layer, x)) < (5e-7 if dtype is torch.float32 else 2**-8)


def test_a_weight_is_decoded_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def counting(decode: Any) -> Any:
        return lambda parts, format: decoded.append(format) or decode(parts, format)

    table = {gemm: counting(decode) for gemm, decode in switches._DECODERS.items()}
    monkeypatch.setattr(switches, "_DECODERS", table)
    layer = nn.Linear(64, 32).requires_grad_(False)
    forward = switched(layer, "mxfp4", "xpu:xe")
    outs = [forward(torch.ones(tokens, 64)) for tokens in (1, 5, 9)]
    assert decoded == ["mxfp4"]
    assert all(torch.equal(out, outs[0].expand_as(out)) for out in outs)
