"""Binds a parameter to its quantized form at run time.

One compiled graph serves many blocks, so it gets its weights by the identity of the parameters it
is called with. A quantized form lives as long as both the parameters and a compiled graph that
uses it, and is made anew when a parameter has changed, as `weight_changes` notices it. The old one
is given up then, also by graphs that are not called again.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from omniq_compile.compiling import weight_changes
from omniq_compile.compiling.weight_changes import Stamp, comparisons_of, memory_of
from omniq_compile.lowering.errors import WeightError
from omniq_compile.lowering.quantize_weight import holds_finite, quantize_weight
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.lowering.registry import as_stored
from omniq_compile.lowering.tensor_of_parts import inner_tensors
from omniq_compile.passes.context import Binding
from omniq_compile.passes.expression import evaluate

Parts = tuple[torch.Tensor, ...]
# None stands for a part of the parameter itself, which is stored quantized.
OwnParts = tuple[torch.Tensor | None, ...]

_lock = threading.RLock()
_shared: weakref.WeakValueDictionary[Any, QuantizedWeight] = weakref.WeakValueDictionary()
_statistics = {"lookups": 0, "lookup_seconds": 0.0, "quantized": 0, "quantize_seconds": 0.0}


class QuantizedWeight:
    """The parts of one weight, and the stamps of the parameters they were made from.

    For a weight that is stored quantized, only the parts that were laid out anew: the others are
    None here, and are taken from the weight itself. One that was replaced has no parts any more.
    """

    __slots__ = ("__weakref__", "parts", "stamps")

    def __init__(self, binding: Binding, parameters: Sequence[torch.Tensor]) -> None:
        self.stamps = [Stamp(s) for s in _sources(parameters)]
        self.parts: OwnParts | None
        if binding.stored:
            stored: Any = parameters[0]
            self.parts = _arrange_stored(binding, stored.parts)
        else:
            self.parts = _quantize(binding, parameters)
        for device in {stamp.values.device for stamp in self.stamps}:
            weight_changes.wait_until_written(device)

    def is_current(self, sources: Sequence[torch.Tensor]) -> bool:
        """Say whether the parameters still are what was quantized; on an accelerator this waits."""
        return all(
            stamp.has_same_memory(source) and stamp.has_same_values()
            for stamp, source in zip(self.stamps, sources, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts or () if part is not None)


# Of parameters of these types each is its own memory.
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def _sources(parameters: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return the tensors that hold the parameters' memory."""
    if _PLAIN.issuperset(map(type, parameters)):
        return parameters
    return [source for parameter in parameters for source in _memory(parameter)]


def _memory(parameter: torch.Tensor) -> Sequence[torch.Tensor]:
    if isinstance(parameter, QuantizedTensor):
        return parameter.parts
    # Of a `DTensor` the part that this process has.
    return inner_tensors(parameter) if is_traceable_wrapper_subclass(parameter) else (parameter,)


class _Row:
    """A binding, and where its parameters are among a call's arguments and the constants."""

    __slots__ = ("binding", "key", "leaves", "own_parts", "stored")

    def __init__(
        self, binding: Binding, placeholders: Sequence[str], constants: list[torch.Tensor]
    ) -> None:
        self.binding = binding
        self.key = (binding.format, binding.expression.key, binding.arrange)
        self.leaves = []
        for leaf in binding.leaves:
            if isinstance(leaf, str):
                self.leaves.append(placeholders.index(leaf))
            else:
                self.leaves.append(len(placeholders) + len(constants))
                constants.append(leaf)
        self.stored = binding.stored
        # Whatever the parts of a parameter are by now: there is nothing to follow.
        self.own_parts = binding.stored and binding.arrange is as_stored

    def parameters(self, given: Sequence[Any]) -> list[Any]:
        return [given[x] for x in self.leaves]


class _Bound:
    """The weights made from one set of parameters, and whether these still are the same."""

    __slots__ = ("_comparisons", "_memory", "_references", "weights")

    def __init__(
        self,
        weights: Sequence[QuantizedWeight],
        sources: Sequence[torch.Tensor],
        forget: Callable[[Any], None],
    ) -> None:
        self.weights = weights
        stamps = [stamp for weight in weights for stamp in weight.stamps]
        self._memory = [stamp.memory for stamp in stamps]
        self._comparisons = comparisons_of(stamps)
        self._references = [weakref.ref(source, forget) for source in sources]

    def is_current(self, sources: Sequence[torch.Tensor]) -> bool:
        """Say whether nothing is known to have changed, as `weight_changes` notices it."""
        if self._memory != list(map(memory_of, sources)):
            return False
        return not any(comparison.has_changed() for comparison in self._comparisons)


class BoundWeights:
    """The quantized weights of one compiled graph, by the parameters they come from."""

    def __init__(self, bindings: Sequence[Binding], placeholders: Sequence[str]) -> None:
        """Take the bindings, and the names of the traced graph's inputs in order."""
        self._constants: list[torch.Tensor] = []
        self._rows = [_Row(binding, placeholders, self._constants) for binding in bindings]
        self._followed = [row for row in self._rows if not row.own_parts]
        self._leaves = [leaf for row in self._followed for leaf in row.leaves]
        self._bound: dict[tuple[int, ...], _Bound] = {}

    def look_up(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """Return the parts of every binding for the parameters among a call's arguments.

        Raises:
            WeightError: a weight holds NaN or Inf.
        """
        start = time.perf_counter()
        quantizing = _statistics["quantize_seconds"]
        weight_changes.entered()
        given = (*arguments, *self._constants)
        made = iter(self._made_parts(given))
        parts: list[Any] = []
        for row in self._rows:
            if row.own_parts:
                parts += row.parameters(given)[0].parts
            elif row.stored:
                own = row.parameters(given)[0].parts
                parts += [o if new is None else new for o, new in zip(own, next(made), strict=True)]
            else:
                parts += next(made)
        _statistics["lookups"] += len(self._rows)
        spent = time.perf_counter() - start
        _statistics["lookup_seconds"] += spent - (_statistics["quantize_seconds"] - quantizing)
        return parts

    def _made_parts(self, given: Sequence[Any]) -> Sequence[OwnParts]:
        """Return what each row has beside its parameter's own parts, if it has more than these."""
        # In each call for each weight: all that is done here takes the host's time from a GPU.
        sources = _sources([given[leaf] for leaf in self._leaves])
        made = self._bound_parts(sources)
        if made is None:
            made = self._bind([row.parameters(given) for row in self._followed], sources)
        if sources and weight_changes.is_capturing(sources[0].device):
            _keep_for_replays(made, sources)
        return made

    def _bound_parts(self, sources: Sequence[torch.Tensor]) -> Sequence[OwnParts] | None:
        """Return what was made of these sources before, or None where some of them changed."""
        bound = self._bound.get(tuple(map(id, sources)))
        if bound is None or not bound.is_current(sources):
            return None
        held = [weight.parts for weight in bound.weights]
        current = [parts for parts in held if parts is not None]
        # Another graph may have noticed first that one changed, also in another thread.
        return current if len(current) == len(held) else None

    def _bind(
        self, parameters: Sequence[list[torch.Tensor]], sources: Sequence[torch.Tensor]
    ) -> Sequence[OwnParts]:
        numbers = tuple(map(id, sources))
        weights, made = [], []
        # Until all are there, those of before hold the ones that did not change; of the others each
        # gives its parts up to its successor.
        for row, each in zip(self._followed, parameters, strict=True):
            weight, parts = _shared_weight(row, each)
            weights.append(weight)
            made.append(parts)
        self._bound[numbers] = _Bound(weights, sources, self._forget(numbers))
        return made

    def _forget(self, numbers: tuple[int, ...]) -> Callable[[Any], None]:
        """Return what drops the weights of some sources when one dies: its id is free then."""
        reference = weakref.ref(self)

        def forget(_: Any) -> None:
            this = reference()
            if this is not None:
                this._bound.pop(numbers, None)

        return forget


def _shared_weight(row: _Row, parameters: list[torch.Tensor]) -> tuple[QuantizedWeight, OwnParts]:
    """Return the weight that any graph has made of some parameters, or make it; and its parts."""
    sources = _sources(parameters)
    # Dynamo traces a parameter of another shape, dtype or order of axes anew: its memory may be the
    # same, as after ``parameter.data = parameter.data.T``, and its weight is another.
    looks = ((id(s), s.dtype, s.shape, s.stride()) for s in sources)
    identity = (row.key, *looks)
    with _lock:
        weight = _shared.get(identity)
        if weight is None or not weight.is_current(sources):
            stale, weight = weight, QuantizedWeight(row.binding, parameters)
            _shared[identity] = weight
            if stale is not None:
                # Other graphs would hold its memory until they are called again, if ever. Calls
                # that run now have the parts themselves.
                stale.parts = None
        assert weight.parts is not None
        return weight, weight.parts


# Parameters -> the parts that CUDA graphs read, which callers captured: a replay tells nobody.
_captured: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _keep_for_replays(made: Sequence[OwnParts], sources: Sequence[torch.Tensor]) -> None:
    """Let parts live as long as each parameter, whatever becomes of it and of the program."""
    for source in sources:
        _captured.setdefault(source, {}).update((id(parts), parts) for parts in made)


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


def _arrange_stored(binding: Binding, parts: Parts) -> OwnParts:
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
