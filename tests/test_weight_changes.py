"""How a changed parameter is noticed on an accelerator, on a device made up of CPU tensors.

The made-up device finishes work only when the test says so, or when the host waits for it.
"""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_weights import (
    OPTIONS,
    Block,
    assert_near,
    compiled,
    load_state,
    load_state_assigned,
    replace_data,
    replace_parameter,
    residual,
    write_in_place,
    write_low_rank_through_data,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from omniq_compile.compiling import weight_changes, weights
from omniq_compile.compiling.weights import statistics


class Device:
    """Counts how often the host waits, and says which of its events have happened."""

    def __init__(self) -> None:
        self.recorded = itertools.count(1)
        self.finished = 0
        self.last = 0
        self.waits = 0

    def finish(self) -> None:
        self.finished = self.last

    def event(self, _: torch.device) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.number = 0

    def record(self, stream: Any) -> None:
        self.number = self.device.last = next(self.device.recorded)

    def query(self) -> bool:
        return self.number <= self.device.finished

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.finished = max(self.device.finished, self.number)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made_up = Device()
    monkeypatch.setattr(weight_changes, "is_asynchronous", lambda tensor: True)
    monkeypatch.setattr(weight_changes, "new_event", made_up.event)
    monkeypatch.setattr(weight_changes, "current_stream", lambda device: None)
    monkeypatch.setattr(weight_changes, "PAUSE_SECONDS", float("inf"))
    monkeypatch.setattr(weight_changes, "RECHECK_SECONDS", 0)
    return made_up


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the next call find that the host was away for long."""

    def now() -> None:
        monkeypatch.setattr(weight_changes._calls, "last_return", float("-inf"))
        monkeypatch.setattr(weight_changes, "PAUSE_SECONDS", 3600)

    return now


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def warm(block: nn.Module, x: torch.Tensor) -> Any:
    fast = compiled(block)
    for _ in range(2):
        residual(fast, x)
    return fast


def test_calls_in_quick_succession_never_wait(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = Block(), torch.randn(3, 5, 96)
    fast = warm(block, x)

    def wait(stamp: Any) -> bool:
        raise AssertionError("read from the device")

    monkeypatch.setattr(weight_changes.Stamp, "has_same_values", wait)
    waits, quantized = device.waits, statistics()["quantized"]
    for finish in (False, True, False, True):
        if finish:
            device.finish()
        fast(x)
    assert (device.waits, statistics()["quantized"]) == (waits, quantized)


def test_a_write_through_data_is_noticed_once_the_device_has_told(device: Device) -> None:
    block, x = Block(), torch.randn(3, 5, 96)
    fast = warm(block, x)
    device.finish()
    before = residual(fast, x)
    write_low_rank_through_data(block)
    for _ in range(3):  # it is compared behind the first of these, and the device is still at it
        assert torch.equal(residual(fast, x), before)
    device.finish()
    assert torch.equal(residual(fast, x), before)  # the answer to a question before the write
    device.finish()
    assert_near(residual(fast, x), residual(block, x))
    device.finish()
    quantized = statistics()["quantized"]
    fast(x)
    assert statistics()["quantized"] == quantized


def test_a_question_is_asked_once_in_a_while(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = Block(), torch.randn(3, 5, 96)
    fast = warm(block, x)
    device.finish()
    fast(x)  # reads the answer, and asks the last question for long
    monkeypatch.setattr(weight_changes, "RECHECK_SECONDS", 3600)
    write_low_rank_through_data(block)
    asked = device.last
    for _ in range(3):
        fast(x)
        device.finish()
    assert device.last == asked
    monkeypatch.setattr(weight_changes, "RECHECK_SECONDS", 0)
    fast(x)
    assert device.last == asked + 1
    monkeypatch.setattr(weight_changes, "RECHECK_SECONDS", 3600)
    fast(x)  # the device is still at it
    device.finish()
    assert_near(residual(fast, x), residual(block, x))


def test_after_a_pause_one_wait_serves_every_block(device: Device, pause: Any) -> None:
    model, x = nn.Sequential(Block(), Block(), Block()), torch.randn(2, 7, 96)
    for block in model:
        block.compile(backend="omniq", options=OPTIONS)
    for _ in range(2):
        model(x)
    for block in model:
        write_low_rank_through_data(block)
    quantized = statistics()["quantized"]
    pause()
    waits = device.waits
    for block in model:
        expected = block._call_impl(x) - x
        assert_near(residual(block, x), expected)
    assert device.waits - waits == 1
    assert statistics()["quantized"] - quantized == 3


def test_a_pause_asks_about_the_models_of_its_time_alone(
    device: Device, pause: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, x = [Block() for _ in range(3)], torch.randn(2, 7, 96)
    encoder, first, second = ((block, warm(block, x)) for block in blocks)
    monkeypatch.setattr(weight_changes, "RECHECK_SECONDS", 3600)

    def asked_and_waits(*used: tuple[Block, Any]) -> tuple[int, int]:
        for block in blocks:
            write_low_rank_through_data(block)
        pause()
        asked, waits = device.last, device.waits
        for block, fast in used:
            assert_near(residual(fast, x), residual(block, x))
        return device.last - asked, device.waits - waits

    assert asked_and_waits(encoder) == (3, 1)
    assert asked_and_waits(first, second) == (2, 1)
    assert asked_and_waits(encoder) == (1, 1)
    assert asked_and_waits(second) == (2, 1)
    assert asked_and_waits(first, second) == (2, 2)


def test_calls_of_another_thread_hide_no_pause(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, other, x = Block(), Block(), torch.randn(3, 5, 96)
    fast, busy = warm(block, x), warm(other, x)
    monkeypatch.setattr(weight_changes, "PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(weight_changes, "RECHECK_SECONDS", 3600)
    with ThreadPoolExecutor(1) as pool:
        time.sleep(0.6)
        pool.submit(torch.no_grad()(busy), x).result()
        write_low_rank_through_data(block)
        waits = device.waits
        assert_near(residual(fast, x), residual(block, x))
        assert device.waits - waits == 1
        residual(fast, x)
        assert device.waits - waits == 1


@pytest.mark.parametrize(
    "change",
    [write_in_place, replace_data, load_state, load_state_assigned, replace_parameter],
)
def test_what_the_host_can_see_is_noticed_at_once(device: Device, change: Any) -> None:
    block, x = Block(), torch.randn(3, 5, 96)
    fast = warm(block, x)
    change(block)
    assert_near(residual(fast, x), residual(block, x))


def test_nothing_is_asked_about_a_deleted_model(
    device: Device, pause: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, deleted, x = Block(), Block(), torch.randn(3, 5, 96)
    fast, other = warm(block, x), warm(deleted, x)
    del deleted, other
    gc.collect()
    monkeypatch.setattr(weight_changes, "RECHECK_SECONDS", 3600)
    pause()
    asked = device.last
    fast(x)
    assert device.last == asked + 1


def test_two_graphs_that_share_a_weight_both_notice(device: Device, pause: Any) -> None:
    block, x = Block(), torch.randn(3, 5, 96)
    first = warm(block, x)
    second = torch.compile(lambda y: block(y) * 1, backend="omniq", options=OPTIONS)
    second(x)
    write_low_rank_through_data(block)
    quantized = statistics()["quantized"]
    pause()
    for fast in (first, second):
        assert_near(residual(fast, x), residual(block, x))
    assert statistics()["quantized"] - quantized == 1


def test_nothing_is_asked_while_a_graph_is_captured(
    device: Device, pause: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = Block(), torch.randn(3, 5, 96)
    fast = warm(block, x)
    monkeypatch.setattr(weight_changes, "is_capturing", lambda device: True)
    pause()
    waits, asked = device.waits, device.last
    fast(x)
    assert (device.waits, device.last) == (waits, asked)


@pytest.mark.parametrize("rows", [5, 7], ids=["a later call", "the first call of a graph"])
def test_what_a_captured_graph_reads_lives_as_long_as_the_parameters(
    rows: int, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay reads the memory that was captured, whatever the host has done since."""
    others = set(weights._shared.values())
    block, x = Block(), torch.randn(3, 5, 96)
    fast = warm(block, x)
    read: list[Any] = []
    for _ in range(2):
        with monkeypatch.context() as captures:
            captures.setattr(weight_changes, "is_capturing", lambda device: True)
            fast(torch.randn(3, rows, 96))
        made = set(weights._shared.values()) - others
        read += [weakref.ref(part) for weight in made for part in weight.parts]
        del made
        write_in_place(block)
        fast(x)
    assert len(read) == 8
    del fast
    torch._dynamo.reset()
    gc.collect()
    assert all(reference() is not None for reference in read)
    del block
    gc.collect()
    assert all(reference() is None for reference in read)


def test_a_default_device_is_not_the_one_that_answers(device: Device) -> None:
    """An accelerator's memory is not pinned; a tensor without a device would be there."""
    block, x = Block(), torch.randn(3, 5, 96)
    fast = compiled(block)
    with torch.device("meta"):
        assert_near(residual(fast, x), residual(block, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(7, 5), (3000, 130), (130, 3000), (4, 70, 50)])
@pytest.mark.parametrize("transpose", [False, True])
def test_a_comparison_sees_a_change_of_any_layout_and_dtype(
    device: Device, dtype: torch.dtype, shape: tuple[int, ...], transpose: bool
) -> None:
    tensors = [torch.randn(shape).to(dtype), torch.full((9,), float("nan"))]
    if transpose:
        tensors[0] = tensors[0].mT
    (comparison,) = weight_changes.comparisons_of([weight_changes.Stamp(t) for t in tensors])
    assert not comparison.has_changed()  # NaN is what it was
    tensors[0].copy_((tensors[0].float() * -2 + 1).to(dtype))
    device.finish()
    comparison.ask()
    device.finish()
    assert comparison.has_changed()


def test_tensors_of_two_widths_are_all_compared(device: Device, pause: Any) -> None:
    tensors = [torch.ones(40, 30), torch.ones(40, 30, dtype=torch.bfloat16)]
    for changed in tensors:
        (comparison,) = weight_changes.comparisons_of([weight_changes.Stamp(t) for t in tensors])
        assert not comparison.has_changed()
        changed.data += 1
        pause()
        weight_changes.entered()
        assert comparison.has_changed()


def test_what_a_stamp_was_made_of_is_freed(device: Device, pause: Any) -> None:
    block, x = Block(), torch.randn(2, 7, 96)
    fast = warm(block, x)
    storages = [StorageWeakRef(p.untyped_storage()) for p in block.parameters() if p.dim() > 1]
    for parameter in block.parameters():
        parameter.data = parameter.data.clone()  # as a module moves to another device
    assert all(storage.expired() for storage in storages)
    pause()
    assert_near(residual(fast, x), residual(block, x))


def test_a_parameter_that_moved_is_not_read_for_another(device: Device, pause: Any) -> None:
    tensors = [torch.ones(40, 30) for _ in range(4)]
    moved, other = (
        weight_changes.comparisons_of([weight_changes.Stamp(tensor) for tensor in pair])[0]
        for pair in (tensors[:2], tensors[2:])
    )
    tensors[0].data = torch.empty(0)  # as where its model is off the device
    pause()
    weight_changes.entered()
    assert not other.has_changed()
    assert not moved.has_changed()  # what its memory tells is asked before


@pytest.mark.parametrize(
    ("first", "then"), [("no_grad", "inference_mode"), ("inference_mode", "no_grad")]
)
def test_a_model_is_called_under_either_mode(device: Device, first: str, then: str) -> None:
    block, x = Block(), torch.randn(2, 7, 96)
    fast = compiled(block)
    for mode in (first, first, then, then):
        with getattr(torch, mode)():
            residual(fast, x)
            device.finish()


def test_another_thread_may_ask_between_the_look_and_the_lock(device: Device, pause: Any) -> None:
    (comparison,) = weight_changes.comparisons_of([weight_changes.Stamp(torch.ones(40, 30))])
    comparison.has_changed()
    pause()
    weight_changes.entered()

    class Lock:
        def __enter__(self) -> None:
            comparison._ask_with_others(comparison._last_used)

        def __exit__(self, *_: Any) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_changes, "_lock", Lock())
        assert not comparison.has_changed()
