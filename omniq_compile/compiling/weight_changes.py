"""Notices that a parameter is no longer what was quantized.

Compared in each call, without a look at memory:

- the storage (``load_state_dict(assign=True)``, ``.to()``, ``parameter.data = other``);
- the version counter (``load_state_dict``, in-place operations).

Adapters are fused through ``parameter.data``, which moves neither, and tensors made under
``torch.inference_mode()`` have no counter. So a sample of the values is
compared too, spread over all rows and columns so that a low-rank update shows; a write through
``.data``, or to a parameter made under inference_mode, to less than a sixteenth of the rows or
columns can be missed. Of a buffer made there all values are compared.

On the CPU the sample is compared in each call. On an accelerator the host would have to wait until
the device has run everything before it, in each call, and could not run ahead any more. There
`DeviceComparison` compares all weights of a call on the device, leaves the answer in pinned memory
and lets the host go on. What holds for a write through ``.data`` to a parameter on an accelerator:

- A call that begins more than `PAUSE_SECONDS` after the last compiled call of its thread returned,
  or that is the first there, waits once, for the answers about its weights and all that were last
  used between the same two pauses, such as those of a model's other blocks; weights used at another
  time are asked about when they are used again. So no call uses a weight that changed before a
  pause. Loading and fusing adapters, or encoding a prompt, takes the host longer than that; a
  denoising loop takes less from call to call.
- Any other call asks if the last question was `RECHECK_SECONDS` ago, reads the answer once the
  device has given it, and does not wait. A change made between two calls in quick succession is so
  noticed within that time where the device keeps up, and at the latest by the first call after a
  pause.
- While the caller captures a CUDA graph nothing is compared: a replay would not look either.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch

# Values of each parameter that are compared: on the CPU a read from memory each.
SAMPLES = 256

# Where the rows have gaps between them, these are of at most so many rows and columns.
GRID = 16

GOLDEN = (5**0.5 - 1) / 2

# Longer than a scheduler's step on the host (1 to 3 ms), shorter than what fuses an adapter.
PAUSE_SECONDS = 0.01

# To ask in each call would take the host as long as some layers; a step of a large model is longer.
RECHECK_SECONDS = 0.1

_BIT_PATTERNS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_lock = threading.RLock()
_comparisons: weakref.WeakSet[DeviceComparison] = weakref.WeakSet()
_pauses = 0


class _Calls(threading.local):
    """When the last compiled call of this thread returned, whatever others were doing."""

    last_return = float("-inf")


_calls = _Calls()


class Stamp:
    """What a parameter looked like when it was quantized.

    It holds no memory of the parameter, which may move to another device or be freed.
    """

    __slots__ = ("_parameter", "_view", "memory", "values")

    def __init__(self, parameter: torch.Tensor) -> None:
        self.memory = memory_of(parameter)
        with torch.inference_mode(False), torch.no_grad():
            # A buffer without a counter, such as a memory that grows by rows, is compared whole.
            whole = parameter.is_inference() and not isinstance(parameter, torch.nn.Parameter)
            sample = _sample(parameter, whole)
            self.values = sample.clone()
        self._parameter = weakref.ref(parameter)
        self._view = sample.size(), sample.stride(), sample.storage_offset()

    def sample(self) -> torch.Tensor | None:
        """Return the elements that are compared, as integers; None where they are no more."""
        parameter = self._parameter()
        if parameter is None or parameter.data_ptr() != self.memory[0]:
            return None
        return torch.as_strided(_in_words(parameter), *self._view).view(self.values.dtype)

    def has_same_memory(self, parameter: torch.Tensor) -> bool:
        """Compare the storage and the version counter alone."""
        return self.memory == memory_of(parameter)

    def has_same_values(self) -> bool:
        """Compare the sample, which on an accelerator waits for the device."""
        sample = self.sample()
        return sample is not None and torch.equal(sample, self.values)


def memory_of(parameter: torch.Tensor) -> tuple[int, int | None]:
    """Return the address of a parameter's memory, and the count of what was written to it."""
    # Tensors made under inference_mode have no counter; the sample has to do for them.
    version = None if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version


def _sample(parameter: torch.Tensor, whole: bool) -> torch.Tensor:
    """Return a view of some elements as integers, wandering over the rows and the columns."""
    sample = _in_words(parameter.detach())
    if whole:
        return sample.view(_BIT_PATTERNS[sample.element_size()])
    order = sorted(range(sample.dim()), key=sample.stride, reverse=True)
    dense = sample.permute(order)
    if dense.is_contiguous():
        K = dense.shape[-1] if order else 1
        sample = dense.view(-1)[:: _step(sample.numel() // max(1, K), K)]
    elif sample.dim() > 1:
        rows, columns = (-(-size // GRID) for size in sample.shape[-2:])
        sample = sample[..., :: max(1, rows), :: max(1, columns)]
    # Of one axis with gaps, such as a row that a weight is stacked of, all is compared.
    return sample.view(_BIT_PATTERNS[sample.element_size()])


def _in_words(tensor: torch.Tensor) -> torch.Tensor:
    """View numbers of 16 bytes, which no integer has, as pairs."""
    return torch.view_as_real(tensor) if tensor.element_size() > 8 else tensor


def _step(rows: int, K: int) -> int:
    """Return how many elements of ``[rows, K]`` lie between two of a sample of about `SAMPLES`.

    It is some rows and the golden ratio's fraction of one, or its like of the form 1 / (n + ratio):
    multiples of these are spread most evenly over the columns.
    """
    if rows < SAMPLES:
        return max(1, round(K / (SAMPLES // max(1, rows) + GOLDEN)))
    return round(K * (max(0, round(rows / SAMPLES - GOLDEN)) + GOLDEN))


def is_asynchronous(tensor: torch.Tensor) -> bool:
    """Say whether the host runs ahead of the device that holds a tensor."""
    return tensor.device.type != "cpu"


class _Samples:
    """The samples of some parameters on one device, as one tensor for each width of elements."""

    def __init__(self, stamps: Iterable[Stamp]) -> None:
        by_type: dict[torch.dtype, list[Stamp]] = {}
        for stamp in stamps:
            by_type.setdefault(stamp.values.dtype, []).append(stamp)
        self._stamps = list(by_type.values())
        # A tensor made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.values = [_join([s.values for s in same]) for same in self._stamps]

    def read(self) -> list[torch.Tensor | None]:
        """Return what `values` are by now; None where a parameter has moved."""
        with torch.no_grad():
            samples = [[stamp.sample() for stamp in same] for same in self._stamps]
            return [None if any(s is None for s in same) else _join(same) for same in samples]


def _join(samples: Sequence[Any]) -> torch.Tensor:
    return torch.cat([sample if sample.dim() == 1 else sample.flatten() for sample in samples])


class HostComparison:
    """The samples of some parameters on the CPU against what they were, here and now."""

    def __init__(self, stamps: Iterable[Stamp]) -> None:
        self._samples = _Samples(stamps)

    def has_changed(self) -> bool:
        """Say whether the values differ."""
        return any(
            now is None or not torch.equal(now, values)
            for now, values in zip(self._samples.read(), self._samples.values, strict=True)
        )


class DeviceComparison:
    """The samples of some parameters on one accelerator against what they were, without waiting.

    One gather, one comparison and one copy of a byte to the host for each width of elements, queued
    behind the work that is on the current stream of the device.
    """

    def __init__(self, stamps: Iterable[Stamp]) -> None:
        self._samples = _Samples(stamps)
        values = self._samples.values
        self._device = values[0].device
        with torch.inference_mode(False):
            # The default device may be an accelerator, whose memory is not pinned.
            self._answers = torch.zeros(
                len(values), dtype=torch.bool, device="cpu", pin_memory=self._device.type != "cpu"
            )
        self._event = new_event(self._device)
        wait_until_written(self._device)
        # What was just read or compared needs no question.
        self._pause, self._asked, self._is_asked = _pauses, time.perf_counter(), False
        self._last_used = _pauses
        with _lock:
            _comparisons.add(self)

    def has_changed(self) -> bool:
        """Say whether the values are known to differ, and ask again for a later call.

        The first call after a pause asks every comparison that was used when this one was and was
        not asked since, and waits for their answers.
        """
        last_used, self._last_used = self._last_used, _pauses
        has_work = self._is_asked or self._pause < _pauses or self._is_due()
        if not has_work or is_capturing(self._device):
            return False
        with _lock:
            waits = self._pause < _pauses
            if waits:
                self._ask_with_others(last_used)
        if self._is_asked and not waits and not self._event.query():
            return False
        changed = self._is_asked and bool(self._answers.any())
        self._is_asked = False
        if self._is_due():
            self.ask()
        return changed

    def _ask_with_others(self, last_used: int) -> None:
        """Ask this comparison and those that were last used with it, and wait for the answers."""
        behind = [c for c in _comparisons if c._pause < _pauses and c._device == self._device]
        together = [c for c in behind if c is self or c._last_used == last_used]
        for comparison in together:
            comparison.ask()
        together[-1]._event.synchronize()  # the last in the stream's order

    def _is_due(self) -> bool:
        return time.perf_counter() - self._asked >= RECHECK_SECONDS

    def ask(self) -> None:
        """Queue the comparison on the current stream of the device.

        Where a parameter has moved there is nothing to compare: `Stamp.has_same_memory` tells.
        """
        with torch.no_grad():
            for n, (now, values) in enumerate(
                zip(self._samples.read(), self._samples.values, strict=True)
            ):
                if now is not None:
                    self._answers[n].copy_((now != values).any(), non_blocking=True)
        self._event.record(current_stream(self._device))
        self._pause, self._asked, self._is_asked = _pauses, time.perf_counter(), True


def new_event(device: torch.device) -> Any:
    """Return an event of the device's streams, which tells when the work before it is done."""
    return torch.Event(device)


def current_stream(device: torch.device) -> Any:
    """Return the stream of a device that work is queued on; the device need not be current."""
    return torch.accelerator.current_stream(device)


def wait_until_written(device: torch.device) -> None:
    """Wait for what this thread queued on a device: others read it from streams of their own."""
    if device.type != "cpu" and not is_capturing(device):
        current_stream(device).synchronize()


def is_capturing(device: torch.device) -> bool:
    """Say whether the caller is capturing a graph, in which the host may not ask a device anything.

    CUDA's graphs, and those of XPUs and NPUs.
    """
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "is_current_stream_capturing"):
        return False
    with module.device(device):
        return bool(module.is_current_stream_capturing())


def comparisons_of(stamps: Sequence[Stamp]) -> list[HostComparison | DeviceComparison]:
    """Return one comparison for each device that holds some of the stamped parameters."""
    devices: dict[torch.device, list[Stamp]] = {}
    for stamp in stamps:
        devices.setdefault(stamp.values.device, []).append(stamp)
    return [
        DeviceComparison(same) if is_asynchronous(same[0].values) else HostComparison(same)
        for same in devices.values()
    ]


def entered() -> None:
    """Note that a compiled call begins, and whether its thread was away for long before it."""
    global _pauses
    if time.perf_counter() - _calls.last_return > PAUSE_SECONDS:
        with _lock:
            _pauses += 1


def returned() -> None:
    """Note that a compiled call has returned to its caller."""
    _calls.last_return = time.perf_counter()
