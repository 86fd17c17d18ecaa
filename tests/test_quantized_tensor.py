"""QuantizedTensor: it acts as the weight it stands for, whatever is done to it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import format_oracle as oracle
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import dequantized, error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import omniq_compile as omniq
from omniq_compile import CheckpointError, OptionError, QuantizedTensor, WeightError

METHODS = {
    "int8": 0.02,
    "fp8": 0.06,
    "mxfp8": 0.06,
    "mxfp4": 0.2,
    "mxfp4_dualscale": 0.2,
}
by_method = pytest.mark.parametrize("method", METHODS)


def weight(N: int = 50, K: int = 70, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(N, K, dtype=dtype)


def stored_bytes(method: str, N: int, K: int) -> int:
    """The table of the design, with K padded to whole blocks."""
    padded = -(-K // 32) * 32
    coarse = -(-K // 512) * 512
    return {
        "int8": N * K + 4 * N,
        "fp8": N * K + 4 * N,
        "mxfp8": N * padded + N * padded // 32,
        "mxfp4": N * padded // 2 + N * padded // 32,
        "mxfp4_dualscale": N * padded // 2 + N * padded // 32 + 4 * N * coarse // 512,
    }[method]


@by_method
@given(
    N=st.integers(1, 40),
    K=st.integers(1, 700),
    kind=st.sampled_from(["normal", "heavy", "outlier_channels"]),
    dtype=st.sampled_from(oracle.DTYPES),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=25, deadline=None)
def test_describes_and_stores_its_weight(
    method: str, N: int, K: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    w = oracle.make(kind, (N, K), dtype, seed)
    q = omniq.quantize(w, method)
    assert (q.shape, q.dtype, q.device, q.method) == (w.shape, w.dtype, w.device, method)
    assert q.nbytes == sum(part.nbytes for part in q.parts) == stored_bytes(method, N, K)
    values = q.dequantize(torch.float32)
    assert values.shape == w.shape
    # Loose, against full precision: within a block an error is at most some part of its amax.
    step = {"int8": 1 / 253, "fp8": 1 / 27, "mxfp8": 1 / 7}.get(method, 1 / 3.9)
    assert ((values - w.float()).abs() <= w.float().abs().amax(-1, keepdim=True) * step).all()


def test_int8_is_the_published_formula() -> None:
    w = weight(dtype=torch.float32)
    assert torch.equal(
        omniq.quantize(w, "int8").dequantize().double(), dequantized(w).float().double()
    )


@pytest.mark.parametrize("method", ["mxfp8", "mxfp4"])
def test_mx_is_the_standard(method: str) -> None:
    w = weight(dtype=torch.float32)
    element = oracle.E4M3 if method == "mxfp8" else oracle.E2M1
    _, scale, values = oracle.mx(w.numpy(), element)
    q = omniq.quantize(w, method)
    assert np.array_equal(q.scale.numpy(), scale)
    assert np.array_equal(q.dequantize().numpy(), values[:, : w.shape[1]])


def test_a_batch_of_weights() -> None:
    w = torch.randn(3, 20, 40)
    q = omniq.quantize(w, "fp8", weight_block_size=[7, 9])
    for one, whole in zip(w, q.dequantize(), strict=True):
        assert torch.equal(omniq.quantize(one, "fp8", weight_block_size=[7, 9]).dequantize(), whole)


def test_options_change_the_format() -> None:
    w = weight()
    assert omniq.quantize(w, "mxfp4", mxfp4_scale_alg=2).format == "mxfp4_uos"
    assert omniq.quantize(w, "fp8", weight_block_size=[16, 32]).scale.shape == (4, 3)
    assert omniq.quantize(w, "MXFP4-DualScale").method == "mxfp4_dualscale"


@pytest.mark.parametrize(
    ("given", "method", "options", "words"),
    [
        (weight(), "fp9", {}, "unknown method 'fp9'. Did you mean 'fp8'"),
        (weight(), "fp8", {"block_size": [1, 2]}, "unknown option of quantize 'block_size'"),
        (weight(), "int8", {"weight_block_size": [1, 2]}, "is for method fp8"),
        (weight(), "fp8", {"weight_block_size": [0, 2]}, "such as [128, 128]"),
        (torch.ones(3, 4, dtype=torch.int8), "int8", {}, "torch.int8"),
        (torch.ones(3, 4).to(torch.float8_e4m3fn), "int8", {}, "torch.float8_e4m3fn"),
        (torch.ones(4), "int8", {}, "a weight is [..., N, K]"),
        (torch.ones(0, 4), "mxfp4", {}, "shape [0, 4]"),
        (torch.ones(4, 0), "fp8", {}, "shape [4, 0]"),
        (torch.tensor([[1.0, math.nan]]), "mxfp8", {}, "NaN or Inf, which mxfp8"),
        (torch.tensor([[1.0, math.inf]]), "mxfp4", {}, "NaN or Inf, which mxfp4"),
    ],
)
def test_bad_input_is_named(given: Any, method: str, options: Any, words: str) -> None:
    with pytest.raises((OptionError, WeightError)) as raised:
        omniq.quantize(given, method, **options)
    assert words in str(raised.value)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 31)])
@by_method
def test_smaller_than_a_block(method: str, shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    assert error(omniq.quantize(w, method).dequantize(), w) < METHODS[method] * 2


def test_prints_what_it_is() -> None:
    text = repr(omniq.quantize(weight(), "mxfp4", mxfp4_scale_alg=2))
    assert text == (
        "QuantizedTensor(mxfp4 as mxfp4_uos, [50, 70] of bfloat16, 2,550 bytes, device='cpu')"
    )


@by_method
def test_eager_use_computes_with_the_values(method: str) -> None:
    w = weight(dtype=torch.float32)
    q, values = omniq.quantize(w, method), omniq.quantize(w, method).dequantize()
    x = torch.randn(3, 70)
    with torch.no_grad():
        assert torch.equal(nn.functional.linear(x, q), nn.functional.linear(x, values))
        assert torch.equal(x @ q.t(), x @ values.t())
        assert torch.equal(q[3:5], values[3:5])
        assert torch.equal(torch.cat([q, q]), torch.cat([values, values]))
        assert q.double().dtype is torch.float64
        assert torch.equal(q.double().dequantize(), values.double())
        assert q.to(torch.int32).dtype is torch.int32


@by_method
def test_moves_and_copies_keep_the_parts(method: str, tmp_path: Path) -> None:
    w = weight()
    q = omniq.quantize(w, method)
    assert q.to("meta").device.type == "meta"
    assert q.to(torch.float32).dtype is torch.float32
    for other in (q.to(torch.float32), q.clone(), copy.deepcopy(q), q.detach(), q.cpu()):
        assert type(other) is QuantizedTensor
        assert all(oracle.same_bits(a, b) for a, b in zip(other.parts, q.parts, strict=True))
    assert copy.deepcopy(q).codes.data_ptr() != q.codes.data_ptr()

    tensors, metadata = omniq.flatten_state({"a.weight": q, "a.bias": torch.ones(3)})
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = omniq.unflatten_state(read, file.metadata())
    assert sorted(state) == ["a.bias", "a.weight"]
    again = state["a.weight"]
    assert isinstance(again, QuantizedTensor)
    assert (again.format, again.method, again.dtype) == (q.format, q.method, q.dtype)
    assert all(oracle.same_bits(a, b) for a, b in zip(again.parts, q.parts, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.pop("w.scale"), "lacks its part 'w.scale'"),
        (lambda t, m: t.update({"w.scale": torch.ones(3)}), "needs [50] of torch.float32"),
        (
            lambda t, m: m.update(omniq=m["omniq"].replace('"version": 1', '"version": 9')),
            "version 9",
        ),
        (lambda t, m: m.update(omniq="{"), "cannot be read"),
        (lambda t, m: m.update(omniq=m["omniq"].replace("int8", "int9")), "is damaged"),
    ],
)
def test_a_damaged_state_is_refused(change: Any, words: str) -> None:
    tensors, metadata = omniq.flatten_state({"w": omniq.quantize(weight(), "int8")})
    change(tensors, metadata)
    with pytest.raises(CheckpointError) as raised:
        omniq.unflatten_state(tensors, metadata)
    assert words in str(raised.value)


def test_a_state_without_quantized_weights_is_left_alone() -> None:
    tensors = {"w": torch.ones(3)}
    assert omniq.unflatten_state(tensors, {"format": "pt"}) == tensors


@by_method
def test_what_is_written_is_quantized_into_the_same_parts(method: str) -> None:
    w, other = weight(dtype=torch.float32), weight(dtype=torch.float32)
    q = omniq.quantize(w, method)
    pointers = [part.data_ptr() for part in q.parts]

    def holds(values: torch.Tensor) -> bool:
        expected = omniq.quantize(values, method)
        assert [part.data_ptr() for part in q.parts] == pointers
        return all(oracle.same_bits(a, b) for a, b in zip(q.parts, expected.parts, strict=True))

    q.copy_(other)
    assert holds(other)
    q.copy_(omniq.quantize(w, method))
    assert holds(w)
    before = q.dequantize()
    assert q.add_(1) is q
    assert holds(before + 1)
    before = q.dequantize()
    q.data += other
    assert holds(before + other)
    before = q.dequantize()
    q[3:5] = 7.0
    before[3:5] = 7.0
    assert holds(before)
    q.data = other
    assert holds(other)
    q.zero_()
    assert holds(torch.zeros_like(w))
    q.copy_(omniq.quantize(other, "int8" if method == "fp8" else "fp8"))
    assert error(q.dequantize(), other) < 2 * METHODS[method]


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_its_values_may_be_cast_to_what_is_no_float(dtype: torch.dtype) -> None:
    q = omniq.quantize(weight(dtype=torch.float32) * 9, "int8")
    assert torch.equal(q.to(dtype), q.dequantize().to(dtype))
    assert type(q.to(dtype)) is torch.Tensor


@by_method
def test_elements_are_written_beside_others_that_are_not_rounded(method: str) -> None:
    q = omniq.quantize(weight(dtype=torch.bfloat16), method)
    values = q.dequantize(torch.float32)
    values[3:5] = 7.0
    q[3:5] = 7.0
    expected = omniq.quantize(values, method)
    assert all(oracle.same_bits(a, b) for a, b in zip(q.parts, expected.parts, strict=True))


def test_a_write_that_cannot_be_quantized_leaves_the_old_weight() -> None:
    w = weight()
    q = omniq.quantize(w, "int8")
    with pytest.raises(WeightError, match="NaN or Inf"):
        q.copy_(torch.full_like(w, math.nan))
    assert torch.equal(q.dequantize(), omniq.quantize(w, "int8").dequantize())


def test_a_plain_tensor_takes_the_values() -> None:
    w = weight()
    q, plain = omniq.quantize(w, "int8"), torch.zeros_like(w)
    plain.copy_(q)
    assert torch.equal(plain, q.dequantize())
    plain.add_(q)
    assert torch.equal(plain, q.dequantize() * 2)


def test_assigned_data_brings_its_own_parts() -> None:
    q, other = omniq.quantize(weight(), "int8"), omniq.quantize(weight(), "int8")
    parameter = nn.Parameter(q, requires_grad=False)
    parameter.data = other
    assert [p.data_ptr() for p in parameter.parts] == [p.data_ptr() for p in other.parts]


@by_method
def test_a_module_that_holds_one(method: str) -> None:
    layer = nn.Linear(70, 50).to(torch.bfloat16).requires_grad_(False)
    layer.weight = nn.Parameter(omniq.quantize(layer.weight, method), requires_grad=False)
    state = layer.state_dict()
    assert type(state["weight"]) is QuantizedTensor

    twin = nn.Linear(70, 50)
    twin.load_state_dict(state)
    assert torch.equal(twin.weight, layer.weight.dequantize().float())
    other = nn.Linear(70, 50).to(torch.bfloat16)
    layer.load_state_dict(other.state_dict())
    assert oracle.same_bits(layer.weight.codes, omniq.quantize(other.weight, method).codes)
    twin.load_state_dict(state, assign=True)
    assert type(twin.weight) is QuantizedTensor
    assert layer.float().weight.dtype is torch.float32
    assert type(layer.to("meta").weight) is QuantizedTensor
    assert layer.to_empty(device="cpu").weight.codes.device.type == "cpu"


@by_method
def test_moves_under_inference_mode_keep_the_parts(method: str) -> None:
    q, x = omniq.quantize(weight(), method), torch.randn(3, 70, dtype=torch.bfloat16)
    layer = nn.Linear(70, 50, bias=False)
    layer.weight = nn.Parameter(q, requires_grad=False)
    with torch.no_grad():
        product, values = nn.functional.linear(x, q), q.dequantize()
    with torch.inference_mode():
        assert q.to("cpu") is q
        moved = (
            q.to("meta"),
            q.detach(),
            q.clone(),
            copy.deepcopy(q),
            layer.state_dict()["weight"],
        )
        assert {type(other) for other in moved} == {QuantizedTensor}
        assert q.to(torch.float32).dtype is torch.float32
        assert torch.equal(nn.functional.linear(x, q), product)
        for view in (lambda t: t[3:5], lambda t: t.view(-1), lambda t: t.chunk(2)[1]):
            assert torch.equal(view(q), view(values))
        layer.to(torch.float16)
    assert type(layer.weight) is QuantizedTensor
    assert layer.weight.dtype is torch.float16
    assert all(oracle.same_bits(a, b) for a, b in zip(layer.weight.parts, q.parts, strict=True))
    with torch.inference_mode():
        assert type(layer.to("meta").weight) is QuantizedTensor
    assert layer.weight.device.type == "meta"


def test_one_made_under_inference_mode_can_be_written_later() -> None:
    w, other = weight(), weight()
    with torch.inference_mode():
        q = omniq.quantize(w, "int8")
    before = q._version
    q.copy_(other)
    assert q._version > before
    assert torch.equal(q.dequantize(), omniq.quantize(other, "int8").dequantize())


@pytest.mark.parametrize("shape", [(1, 70), (), (0,), (70, 50)])
def test_assigned_data_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    q = omniq.quantize(weight(), "int8")
    before = q.dequantize()
    with pytest.raises(WeightError, match=r"shape \[50, 70\].*cannot take data of shape"):
        q.data = torch.ones(shape, dtype=q.dtype)
    assert torch.equal(q.dequantize(), before)


def test_assigned_data_brings_no_gradient() -> None:
    q = omniq.quantize(weight(), "int8")
    expected = q.dequantize() + 1
    q.data = q.data + torch.ones(50, 70, requires_grad=True)
    assert (q.is_leaf, q.requires_grad) == (True, False)
    assert (q.dequantize() - expected).abs().amax() < 0.05


class _Counted(TorchDispatchMode):
    """Counts the operations on plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = not any(issubclass(t, QuantizedTensor) for t in types)
        self.count += plain
        return func(*args, **(kwargs or {})) if plain else NotImplemented


@by_method
def test_how_a_result_looks_is_known_without_values(method: str) -> None:
    """What Dynamo asks of each linear: a model of a thousand would take minutes."""
    q, x = omniq.quantize(weight(), method), torch.randn(3, 70, dtype=torch.bfloat16)
    expected = nn.functional.linear(x, q)
    with FakeTensorMode() as mode:
        fake_q, fake_x = mode.from_tensor(q), mode.from_tensor(x)
        with _Counted() as counted:
            found = nn.functional.linear(fake_x, fake_q)
            values = fake_q.dequantize()
    assert counted.count <= 6
    for fake, real in ((found, expected), (values, q.dequantize())):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@by_method
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_program_computes_the_values(method: str, mode: Any) -> None:
    """However its operations are recorded."""
    q, other = omniq.quantize(weight(), method), omniq.quantize(weight(), method)
    x = torch.randn(3, 70, dtype=torch.bfloat16)

    def function(x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, q.with_parts(parts))

    program = make_fx(function, tracing_mode=mode)(x, *q.parts)
    assert torch.equal(program(x, *other.parts), nn.functional.linear(x, other))
