"""What is written into a view of a stored weight is quantized into the weight.

A view is of dequantized values, which are a copy: ``weight[0].zero_()`` wrote into memory that was
gone a moment later. So views get memory whose end can be noticed, and PyTorch itself counts what is
written into them: a view has the version counter of the tensor that it was taken of. The values are
quantized when the weight is next used, or when the last view is gone.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

# Private, checked on torch 2.11 to 2.15.
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.dlpack import from_dlpack
from torch.utils.weak import WeakIdKeyDictionary

from omniq_compile.lowering.tensor_of_parts import TensorOfParts

# Where torch's own exchange of memory is known to be one without a copy.
_DEVICES = ("cpu", "cuda")


class _Views:
    """The views that one operation made, and the values that they are views of."""

    def __init__(self, weight: TensorOfParts, values: torch.Tensor) -> None:
        self.weight = weight
        self.codes = weight.parts[0]
        self.values = values
        self.version = weight._version
        # There some operators make views that have a version counter of their own.
        self.counted = not torch.is_inference_mode_enabled()
        # While this is true the values are no news.
        self.resting = False

    # A view may end within a compiled call, in a frame that Dynamo leaves to Python: it would trace
    # these, which know versions that it does not.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def take(self) -> None:
        """Quantize the values if a view was written into."""
        unchanged = self.counted and self.weight._version == self.version
        if unchanged or self.resting or self.weight.parts[0] is not self.codes:
            return
        self.version = self.weight._version
        self.resting = True
        try:
            with torch.inference_mode(False), torch.no_grad():
                # Or the weight itself was written to: `renew` has put that into the values.
                if not torch.equal(self.values, self.weight.dequantize()):
                    self.weight.copy_(self.values)
        finally:
            self.resting = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """Do so for the last time."""
        # An empty list stays: another thread may be about to append to it.
        _live[self.codes].remove(self)
        self.take()


# By a weight's codes, which are those of its aliases too.
_live: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_view(func: Any) -> bool:
    """Say whether an operator's results are views of its arguments."""
    return any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in func._schema.returns
    )


def watched(weight: TensorOfParts, values: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the memory of a weight's ``values``, of which views may be taken.

    Tensors that are traced, or of other devices, are returned as they are.
    """
    if get_proxy_mode() is not None or weight.device.type not in _DEVICES:
        return values
    views = _Views(weight, values)
    with torch.inference_mode(False):
        # The memory of what is made of it refers to it, and nothing else does: it ends with the
        # last tensor in that memory.
        handle = values.detach()
        if type(handle) is not torch.Tensor:
            return values
        _live.setdefault(views.codes, []).append(views)
        weakref.finalize(handle, views.end).atexit = False
        with torch.cuda.device_of(handle):  # of another than the current device none is exchanged
            return from_dlpack(handle)


def _of(weight: TensorOfParts) -> tuple[_Views, ...]:
    return tuple(_live.get(weight.parts[0], ())) if _live else ()


def take(weight: TensorOfParts) -> None:
    """Quantize what was written into views of a weight."""
    for views in _of(weight):
        views.take()


def renew(weight: TensorOfParts) -> None:
    """Show what was written into a weight in its views."""
    if not (stale := _of(weight)):
        return
    for views in stale:
        views.resting = True
    try:
        values = weight.dequantize()
        for views in stale:
            views.values.copy_(values)
    finally:
        for views in stale:
            views.resting = False
