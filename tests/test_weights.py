"""Weights are found by the identity of their parameters, in every call."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from format_oracle import same_bits
from torch import nn

from omniq_compile import WeightError
from omniq_compile.compiling import weights
from omniq_compile.compiling.weights import resident_bytes, statistics
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.formats.rows import dequantize_rows, quantize_rows

OPTIONS = {"method": "int8", "min_features": 1, "compiler": "aot_eager"}


class Block(nn.Module):
    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def compiled(module: nn.Module, **options: Any) -> Any:
    return torch.compile(module, backend="omniq", options=OPTIONS | options)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, limit: float = 0.02) -> None:
    assert ((actual - expected).norm() / expected.norm()).item() < limit


def residual(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the block adds, so that the input itself does not hide a wrong weight."""
    return block(x) - x


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def test_three_blocks_through_one_region_give_three_answers() -> None:
    model = nn.Sequential(Block(), Block(), Block())
    x = torch.randn(2, 7, 96)
    expected = [residual(b, x) for b in model]
    for block in model:
        block.compile(backend="omniq", options=OPTIONS)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for block, answer in zip(model, expected, strict=True):
        assert_near(residual(block, x), answer)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert (expected[0] - expected[1]).norm() / expected[0].norm() > 0.5


def write_in_place(block: Block) -> None:
    block.up.weight.mul_(-2)


def write_through_data(block: Block) -> None:
    block.up.weight.data += torch.randn_like(block.up.weight)


def write_low_rank_through_data(block: Block) -> None:
    # As peft fuses an adapter: neither the version counter nor the storage moves.
    a, b = torch.randn(4, 96), torch.randn(192, 4)
    block.up.weight.data += b @ a


def replace_data(block: Block) -> None:
    block.up.weight.data = torch.randn_like(block.up.weight)


def load_state(block: Block) -> None:
    block.load_state_dict(Block().state_dict())


def load_state_assigned(block: Block) -> None:
    block.load_state_dict(Block().state_dict(), assign=True)


def replace_parameter(block: Block) -> None:
    block.up.weight = nn.Parameter(torch.randn(192, 96))


@pytest.mark.parametrize(
    "change",
    [write_in_place, write_through_data, write_low_rank_through_data, replace_data, load_state,
     load_state_assigned, replace_parameter],
)  # fmt: skip
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_changed_weight_is_quantized_anew(change: Any, mode: Any) -> None:
    block, x = Block(), torch.randn(3, 5, 96)
    fast = compiled(block)
    with mode():
        before = residual(fast, x)
        assert_near(before, residual(block, x))
        change(block)
        expected = residual(block, x)
        assert (expected - before).norm() / expected.norm() > 0.1
        assert_near(residual(fast, x), expected)


def transpose(weight: nn.Parameter) -> None:
    weight.data = weight.data.t()


def reinterpret(weight: nn.Parameter) -> None:
    weight.data = weight.data.view(torch.float16)


def take_fewer_rows(weight: nn.Parameter) -> None:
    weight.data = weight.data[:64]


# Dynamo 2.11 traces a parameter anew for another dtype, and not for other sizes or strides.
from_212 = pytest.mark.skipif(torch.__version__ < "2.12", reason="Dynamo 2.11 sees no change")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(transpose, marks=from_212),
        reinterpret,
        pytest.param(take_fewer_rows, marks=from_212),
    ],
)
def test_the_same_memory_seen_in_another_way_is_another_weight(change: Any) -> None:
    layer = nn.Linear(96, 96, bias=False, dtype=torch.bfloat16)
    fast, x = compiled(layer), torch.randn(7, 96)
    fast(x.bfloat16())
    change(layer.weight)
    x = x.to(layer.weight.dtype)
    assert_near(fast(x).float(), layer(x).float())


class Stacked(nn.Module):
    """Multiplies by a matrix whose rows are parameters with gaps in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList(nn.Parameter(torch.randn(192)[::2]) for _ in range(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.stack(list(self.rows)).t()


def test_a_weight_of_rows_with_gaps_is_followed_too() -> None:
    model, x = Stacked(), torch.randn(5, 96)
    fast = compiled(model)
    assert_near(fast(x), model(x))
    for row in model.rows:
        row.data *= -2
    assert_near(fast(x), model(x))


def test_a_weight_made_under_inference_mode_is_followed_too() -> None:
    with torch.inference_mode():
        block, x = Block(), torch.randn(3, 5, 96)
        fast = compiled(block)
        assert_near(residual(fast, x), residual(block, x))
        block.up.weight.mul_(-2)
        assert_near(residual(fast, x), residual(block, x))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_weight_of_complex_numbers_is_followed_too(dtype: torch.dtype) -> None:
    """Its sample is compared as integers, and none has sixteen bytes."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(96, 57, dtype=dtype))
    model.forward = lambda x: nn.functional.linear(x, model.weight.real.float())
    call, x = compiled(model), torch.randn(7, 57)
    assert_near(call(x), model.forward(x))
    model.weight.data.mul_(2)
    assert_near(call(x), model.forward(x))


def test_a_write_in_place_to_one_element_is_noticed() -> None:
    block, x = Block(), torch.randn(3, 5, 96)
    fast = compiled(block)
    fast(x)
    for column in range(3):  # of neighbours, a sample of values has one at most
        quantized = statistics()["quantized"]
        block.up.weight[0, column] = 1.0
        fast(x)
        assert statistics()["quantized"] == quantized + 1


def test_an_unchanged_weight_is_quantized_once() -> None:
    block = Block()
    fast = compiled(block)
    before = statistics()["quantized"]
    for tokens in (5, 7, 9, 5):
        fast(torch.randn(1, tokens, 96))
    assert statistics()["quantized"] - before == 2


def test_two_models_do_not_mix() -> None:
    first, second, x = Block(), Block(), torch.randn(2, 7, 96)
    fast_first, fast_second = compiled(first), compiled(second)
    for _ in range(2):
        assert_near(residual(fast_first, x), residual(first, x))
        assert_near(residual(fast_second, x), residual(second, x))


def test_a_deleted_model_frees_its_quantized_weights() -> None:
    gc.collect()
    start = resident_bytes()
    keep, drop = Block(), Block()
    fast_keep, fast_drop = compiled(keep), compiled(drop)
    x = torch.randn(1, 3, 96)
    fast_keep(x)
    fast_drop(x)
    one = 2 * 96 * 192 + 4 * (96 + 192)
    assert resident_bytes() - start == 2 * one
    del drop, fast_drop
    gc.collect()
    assert resident_bytes() - start == one
    assert_near(residual(fast_keep, x), residual(keep, x))


def test_a_replaced_weight_frees_the_old_one() -> None:
    gc.collect()
    start = resident_bytes()
    block, x = Block(), torch.randn(1, 3, 96)
    fast = compiled(block)
    fast(x)
    one = resident_bytes() - start
    for _ in range(3):
        block.up.weight = nn.Parameter(torch.randn(192, 96))
        fast(x)
        write_in_place(block)
        fast(x)
    gc.collect()
    assert resident_bytes() - start == one


def test_a_replaced_weight_is_given_up_by_graphs_that_are_not_called_again() -> None:
    gc.collect()
    start = resident_bytes()
    others = set(weights._shared.values())
    block = Block()
    inputs = [torch.randn(1, tokens, 96) for tokens in (3, 5)]
    fast = torch.compile(block, backend="omniq", options=OPTIONS, dynamic=False)
    for x in inputs:
        fast(x)
    one = resident_bytes() - start
    made = set(weights._shared.values()) - others
    old = [weakref.ref(part) for weight in made for part in weight.parts]
    del made
    block.up.weight.data.mul_(-2)
    block.down.weight.data.mul_(-2)
    fast(inputs[0])
    assert [reference() for reference in old] == [None] * 4
    assert resident_bytes() - start == one
    quantized = statistics()["quantized"]
    for x in inputs:
        assert_near(residual(fast, x), residual(block, x))
    assert statistics()["quantized"] == quantized


def test_a_weight_that_was_exchanged_and_put_back_is_there_for_graphs_not_called_between() -> None:
    """These see the memory and the values that they know; their parts were given up."""
    block = Block()
    inputs = [torch.randn(1, tokens, 96) for tokens in (3, 5)]
    fast = torch.compile(block, backend="omniq", options=OPTIONS, dynamic=False)
    for x in inputs:
        fast(x)
    own = block.up.weight.data
    block.up.weight.data = torch.randn_like(own)
    assert_near(residual(fast, inputs[0]), residual(block, inputs[0]))
    block.up.weight.data = own
    for x in reversed(inputs):
        assert_near(residual(fast, x), residual(block, x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "int8"},
        {"method": "fp8"},
        {"method": "mxfp8"},
        {"method": "mxfp4"},
        {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0},
    ],
    ids=lambda options: options["method"],
)
def test_a_weight_that_is_not_finite_names_its_layer(bad: float, options: dict[str, Any]) -> None:
    model = nn.Sequential(Block(), Block())
    model[1].down.weight[3, 2] = bad
    with pytest.raises(WeightError, match=r"'1\.down'.*NaN or Inf"):
        compiled(model, **options)(torch.randn(2, 96))


@pytest.mark.parametrize("format", ["int8", "fp8_block_128x96", "mxfp4_dualscale"])
@pytest.mark.parametrize("shape", [(7, 5), (2000, 300), (2, 1700, 333)])
def test_quantizing_some_rows_at_a_time_changes_nothing(
    shape: tuple[int, ...], format: str
) -> None:
    form, weight = get_format(format), torch.randn(*shape)
    parts, whole = quantize_rows(weight, form), form.quantize(weight)
    for chunked, expected in zip(parts, whole, strict=True):
        assert same_bits(chunked, expected)
    values = dequantize_rows(whole, form, weight.shape, torch.float32)
    assert torch.equal(values, form.dequantize(whole)[..., : shape[-1]])
