"""Binds a parameter to its quantized form at run time.

One compiled graph serves many blocks, so it gets its weights by the identity of the parameters it
is called with. A quantized form lives as long as both the parameters and a compiled graph that
uses it, and is made anew when a parameter has changed, as `weight_changes` notices it.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from omniq_compile import weight_changes
from omniq_compile.lowering.errors import WeightError
from omniq_compile.lowering.quantize_weight import holds_finite, quantize_weight
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.lowering.registry import as_stored
from omniq_compile.passes.context import Binding
from omniq_compile.passes.expression import evaluate
from omniq_compile.weight_changes import Comparison, Stamp, comparisons_of

Parts = tuple[torch.Tensor, ...]

_lock = threading.RLock()
_shared: weakref.WeakValueDictionary[Any, QuantizedWeight] = weakref.WeakValueDictionary()
_statistics = {"lookups": 0, "lookup_seconds": 0.0, "quantized": 0, "quantize_seconds": 0.0}


class QuantizedWeight:
    """The parts of one weight, and the stamps of the parameters they were made from.

    Of a weight that is stored quantized, the parts that were laid out anew: the others are its own,
    and None here.
    """

    __slots__ = ("__weakref__", "parts", "stamps")

    def __init__(self, binding: Binding, parameters: Sequence[torch.Tensor]) -> None:
        self.stamps = [Stamp(s) for s in _sources(parameters)]
        self.parts: tuple[torch.Tensor | None, ...]
        if binding.stored:
            stored: Any = parameters[0]
            self.parts = _arrange_stored(binding, stored.parts)
        else:
            self.parts = _quantize(binding, parameters)

    def is_current(self, sources: Sequence[torch.Tensor], wait: bool) -> bool:
        """Say whether the parameters still are what was quantized.

        With ``wait`` the values of all are compared here and now, else those on the CPU.
        """
        return all(
            stamp.has_same_memory(source)
            and (
                not (wait or not weight_changes.is_asynchronous(source)) or stamp.has_same_values()
            )
            for stamp, source in zip(self.stamps, sources, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts if part is not None)


def _sources(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors that hold the parameters' memory."""
    return [s for p in parameters for s in (p.parts if isinstance(p, QuantizedTensor) else (p,))]


class BoundWeights:
    """The quantized weights of one compiled graph, by the parameters they come from."""

    def __init__(self, bindings: Sequence[Binding], placeholders: Sequence[str]) -> None:
        """Take the bindings, and the names of the traced graph's inputs in order."""
        self._rows = [
            (
                binding,
                (binding.format, binding.expression.key, binding.arrange),
                [placeholders.index(x) if isinstance(x, str) else x for x in binding.leaves],
            )
            for binding in bindings
        ]
        self._held: dict[Any, tuple[QuantizedWeight, list[weakref.ref[torch.Tensor]]]] = {}
        self._comparisons: dict[tuple[int, ...], list[Comparison]] = {}

    def look_up(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """Return the parts of every binding for the parameters among a call's arguments.

        Raises:
            WeightError: a weight holds NaN or Inf.
        """
        start = time.perf_counter()
        quantizing = _statistics["quantize_seconds"]
        weight_changes.entered()
        parts, bound = self._collect(arguments, wait=False)
        if self._values_changed(bound):
            parts, _ = self._collect(arguments, wait=True)
        _statistics["lookups"] += len(self._rows)
        spent = time.perf_counter() - start
        _statistics["lookup_seconds"] += spent - (_statistics["quantize_seconds"] - quantizing)
        return parts

    def _collect(
        self, arguments: Sequence[Any], wait: bool
    ) -> tuple[list[torch.Tensor], list[QuantizedWeight]]:
        """Return the parts of every binding, and those weights that are kept here."""
        parts: list[torch.Tensor] = []
        bound: list[QuantizedWeight] = []
        for binding, key, leaves in self._rows:
            parameters = [arguments[x] if isinstance(x, int) else x for x in leaves]
            stored: Any = parameters[0] if binding.stored else None
            if stored is not None and binding.arrange is as_stored:
                parts += stored.parts
                continue
            weight = self._get(binding, key, parameters, wait)
            bound.append(weight)
            for position, part in enumerate(weight.parts):
                parts.append(stored.parts[position] if part is None else part)
        return parts, bound

    def _values_changed(self, bound: list[QuantizedWeight]) -> bool:
        key = tuple(map(id, bound))
        comparisons = self._comparisons.get(key)
        if comparisons is None:
            comparisons = comparisons_of([stamp for weight in bound for stamp in weight.stamps])
            self._comparisons[key] = comparisons
        # All are asked, also after one has said yes.
        return any([comparison.has_changed() for comparison in comparisons])

    def _get(
        self, binding: Binding, key: Any, parameters: list[torch.Tensor], wait: bool
    ) -> QuantizedWeight:
        sources = _sources(parameters)
        identity = (key, *map(id, sources))
        held = self._held.get(identity)
        if held is not None and held[0].is_current(sources, wait):
            return held[0]
        with _lock:
            weight = _shared.get(identity)
            if weight is None or not weight.is_current(sources, wait=True):
                weight = QuantizedWeight(binding, parameters)
                _shared[identity] = weight
            self._hold(identity, weight, sources)
        return weight

    def _hold(
        self, identity: Any, weight: QuantizedWeight, sources: Sequence[torch.Tensor]
    ) -> None:
        """Keep a weight until one of its sources dies: its ``id`` may then mean another."""
        held, comparisons = self._held, self._comparisons
        if identity in held:
            _drop(comparisons, id(held[identity][0]))
        number = id(weight)

        def forget(_: Any) -> None:
            held.pop(identity, None)
            _drop(comparisons, number)
            _shared.pop(identity, None)

        held[identity] = (weight, [weakref.ref(s, forget) for s in sources])

    @property
    def nbytes(self) -> int:
        """Bytes of all quantized weights held."""
        return sum(weight.nbytes for weight, _ in list(self._held.values()))


def _drop(comparisons: dict[tuple[int, ...], list[Comparison]], weight: int) -> None:
    """Forget the comparisons of a weight by its id, which may mean another one from now on."""
    for key in [key for key in list(comparisons) if weight in key]:
        comparisons.pop(key, None)


def _quantize(binding: Binding, parameters: Sequence[torch.Tensor]) -> Parts:
    start = time.perf_counter()
    weight = evaluate(binding.expression, parameters)
    with torch.inference_mode(False), torch.no_grad():
        parts: Parts = quantize_weight(weight, binding.format)
        if not holds_finite(parts):
            raise WeightError(
                f"the weight of {' and '.join(map(repr, binding.layers))} holds NaN or Inf, which "
                f"{binding.format} cannot represent. Check the checkpoint, or keep the layer with "
                f"options={{'ignored_layers': [{binding.layers[0]!r}]}}."
            )
        parts = tuple(binding.arrange(parts))
    _statistics["quantized"] += 1
    _statistics["quantize_seconds"] += time.perf_counter() - start
    return parts


def _arrange_stored(binding: Binding, parts: Parts) -> tuple[torch.Tensor | None, ...]:
    """Lay parts out as the kernel reads them; None for one that stays as it is stored."""
    with torch.inference_mode(False), torch.no_grad():
        arranged = binding.arrange(parts)
    return tuple(None if new is old else new for new, old in zip(arranged, parts, strict=True))


def statistics() -> dict[str, float]:
    """Return counters since the process began: lookups, weights quantized, and their seconds."""
    return dict(_statistics)


def resident_bytes() -> int:
    """Return the bytes of all quantized weights alive in this process."""
    with _lock:
        return sum(weight.nbytes for weight in list(_shared.values()))
