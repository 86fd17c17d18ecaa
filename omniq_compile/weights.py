"""Binds a parameter to its quantized form at run time.

One compiled graph serves many blocks, so it gets its weights by the identity of the parameters it
is called with. A quantized form lives as long as both the parameters and a compiled graph that
uses it, and is made anew when a parameter has changed.

How a change is noticed, in each call:

- another parameter object, or another storage (``load_state_dict(assign=True)``, ``.to()``);
- the parameter's version counter (``load_state_dict``, in-place operations);
- a sample of its values, for writes through ``param.data``, which no counter sees: adapters are
  fused that way. The sample is spread over all rows and columns, so a low-rank update shows; a
  write through ``.data`` to a handful of elements can be missed.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from omniq_compile.lowering.errors import WeightError
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.formats.rows import quantize_rows
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.passes.context import Binding
from omniq_compile.passes.expression import evaluate

Parts = tuple[torch.Tensor, ...]

# Values compared in each call: a read from memory each, about 20 us a weight.
SAMPLES = 256

_lock = threading.RLock()
_shared: weakref.WeakValueDictionary[Any, QuantizedWeight] = weakref.WeakValueDictionary()
_statistics = {"lookups": 0, "lookup_seconds": 0.0, "quantized": 0, "quantize_seconds": 0.0}


class _Stamp:
    """What a parameter looked like when it was quantized."""

    __slots__ = ("pointer", "sample", "values", "version")

    def __init__(self, parameter: torch.Tensor) -> None:
        self.version = _version(parameter)
        self.pointer = parameter.data_ptr()
        with torch.inference_mode(False), torch.no_grad():
            self.sample = _sample(parameter)
            self.values = self.sample.clone()

    def is_current(self, parameter: torch.Tensor) -> bool:
        return (
            self.pointer == parameter.data_ptr()
            and self.version == _version(parameter)
            and torch.equal(self.sample, self.values)
        )


def _version(parameter: torch.Tensor) -> int | None:
    # Tensors made under inference_mode have no counter; the sample has to do for them.
    return None if parameter.is_inference() else parameter._version


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """Return a view of some elements, wandering over the rows and the columns."""
    parameter = parameter.detach()
    if not parameter.is_contiguous():
        return parameter.diagonal(0, -2, -1) if parameter.dim() > 1 else parameter
    # An odd stride does not fall into step with the even number of columns that most weights have.
    return parameter.view(-1)[:: parameter.numel() // SAMPLES | 1]


class QuantizedWeight:
    """The parts of one weight, and the stamps of the parameters they were made from."""

    __slots__ = ("__weakref__", "parts", "stamps")

    def __init__(self, binding: Binding, parameters: Sequence[torch.Tensor]) -> None:
        self.stamps = [_Stamp(s) for s in _sources(parameters)]
        self.parts = _quantize(binding, parameters)

    def is_current(self, sources: Sequence[torch.Tensor]) -> bool:
        """Say whether the parameters still are what was quantized."""
        return all(stamp.is_current(s) for stamp, s in zip(self.stamps, sources, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


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
                (binding.format, binding.expression.key),
                [placeholders.index(x) if isinstance(x, str) else x for x in binding.leaves],
            )
            for binding in bindings
        ]
        self._held: dict[Any, tuple[QuantizedWeight, list[weakref.ref[torch.Tensor]]]] = {}

    def look_up(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """Return the parts of every binding for the parameters among a call's arguments.

        Raises:
            WeightError: a weight holds NaN or Inf.
        """
        start = time.perf_counter()
        quantizing = _statistics["quantize_seconds"]
        parts: list[torch.Tensor] = []
        for binding, key, leaves in self._rows:
            parameters = [arguments[x] if isinstance(x, int) else x for x in leaves]
            if binding.stored:
                stored: Any = parameters[0]
                parts += stored.parts
            else:
                parts += self._get(binding, key, parameters).parts
        _statistics["lookups"] += len(self._rows)
        spent = time.perf_counter() - start
        _statistics["lookup_seconds"] += spent - (_statistics["quantize_seconds"] - quantizing)
        return parts

    def _get(self, binding: Binding, key: Any, parameters: list[torch.Tensor]) -> QuantizedWeight:
        sources = _sources(parameters)
        identity = (key, *map(id, sources))
        held = self._held.get(identity)
        if held is not None and held[0].is_current(sources):
            return held[0]
        with _lock:
            weight = _shared.get(identity)
            if weight is None or not weight.is_current(sources):
                weight = QuantizedWeight(binding, parameters)
                _shared[identity] = weight
            self._hold(identity, weight, sources)
        return weight

    def _hold(
        self, identity: Any, weight: QuantizedWeight, sources: Sequence[torch.Tensor]
    ) -> None:
        """Keep a weight until one of its sources dies: its ``id`` may then mean another."""
        held = self._held

        def forget(_: Any) -> None:
            held.pop(identity, None)
            _shared.pop(identity, None)

        held[identity] = (weight, [weakref.ref(s, forget) for s in sources])

    @property
    def nbytes(self) -> int:
        """Bytes of all quantized weights held."""
        return sum(weight.nbytes for weight, _ in list(self._held.values()))


def _quantize(binding: Binding, parameters: Sequence[torch.Tensor]) -> Parts:
    start = time.perf_counter()
    weight = evaluate(binding.expression, parameters)
    with torch.inference_mode(False), torch.no_grad():
        parts = quantize_rows(weight, get_format(binding.format))
        if not all(torch.isfinite(p).all() for p in parts[1:]):
            raise WeightError(
                f"the weight of {' and '.join(map(repr, binding.layers))} holds NaN or Inf, which "
                f"{binding.format} cannot represent. Check the checkpoint, or keep the layer with "
                f"options={{'ignored_layers': [{binding.layers[0]!r}]}}."
            )
    _statistics["quantized"] += 1
    _statistics["quantize_seconds"] += time.perf_counter() - start
    return parts


def statistics() -> dict[str, float]:
    """Return counters since the process began: lookups, weights quantized, and their seconds."""
    return dict(_statistics)


def resident_bytes() -> int:
    """Return the bytes of all quantized weights alive in this process."""
    with _lock:
        return sum(weight.nbytes for weight in list(_shared.values()))
