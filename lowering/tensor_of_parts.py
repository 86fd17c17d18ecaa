"""A tensor whose memory is that of other tensors, its parts: what asks for memory is asked of them.

The tensor itself has a shape and a dtype, and no storage. PyTorch does not know that where it works
on memory and not on values: it reads a null pointer, or marks a copy of the values that is gone a
moment later.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from omniq_compile.lowering.errors import WeightError

aten = torch.ops.aten


class TensorOfParts(torch.Tensor):
    """A wrapper around tensors that hold codes and scales in a format."""

    format: str

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The stored tensors, codes first."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def data_ptr(self) -> int:
        """Return 0, as PyTorch does for a tensor without memory of its own."""
        return 0

    def storage(self) -> NoReturn:
        """Refuse what safetensors and accelerate ask for where they save, or load in place.

        Raises:
            WeightError: always.
        """
        raise WeightError(
            f"a weight that is stored as {self.format} has no storage of its own, which "
            "safetensors asks for. Save the model with save_pretrained(), or the tensors and "
            "metadata of omniq_compile.flatten_state(model.state_dict()); load what is not "
            "quantized with model.load_state_dict(safetensors.torch.load_file(file)), which "
            "quantizes it."
        )

    def share_memory_(self) -> TensorOfParts:
        """Move the parts to shared memory, in place."""
        let_go(self)
        for part in self.parts:
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Say whether all parts are in shared memory."""
        return all(part.is_shared() for part in self.parts)

    def __dlpack__(self, *, copy: bool | None = None, **options: Any) -> Any:
        """Return a capsule with the dequantized values; what writes into it changes a copy.

        Raises:
            WeightError: ``copy=False``, which asks for the weight's own memory.
        """
        if copy is False:
            raise WeightError(
                f"a weight that is stored as {self.format} has no memory with its values, which "
                "copy=False asks for. Leave it out, or pass .dequantize()."
            )
        return self.dequantize().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        """Return the device of the dequantized values, which are never in pinned memory."""
        return torch.empty(0, device=self.device).__dlpack_device__()


def foreign_kind(tensor: Any) -> str | None:
    """Name the class of a tensor that is made of others and none of ours, such as a `DTensor`."""
    foreign = is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, TensorOfParts)
    return type(tensor).__name__ if foreign else None


def inner_tensors(tensor: Any) -> list[torch.Tensor]:
    """Return what a tensor of any subclass that PyTorch traces is made of, such as a `DTensor`."""
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [thing for thing in inner if isinstance(thing, torch.Tensor)]


def let_go(tensor: TensorOfParts) -> None:
    """Free what refers to a tensor weakly from a cycle that nothing reaches, as Dynamo leaves it.

    Modules swap tensors of a subclass (``Module.to``, ``Module.share_memory``), which
    torch.utils.swap_tensors refuses where one is weakly referred to.
    """
    if type(tensor.parts[0]) is torch.Tensor and weakref.getweakrefs(tensor):
        gc.collect()


def refuse(func: Any, *arguments: Any, **_: Any) -> NoReturn:
    """Refuse an operator that changes what memory or shape a tensor has.

    Raises:
        WeightError: always.
    """
    format = next(x.format for x in arguments if isinstance(x, TensorOfParts))
    raise WeightError(
        f"{func} changes the memory or the shape of a tensor in place, and a weight that is stored "
        f"as {format} has neither of its own. Call .dequantize() first, or write values with copy_."
    )


def _record_stream(func: Any, tensor: TensorOfParts, stream: torch.Stream) -> None:
    for part in tensor.parts:
        func(part, stream)


def _is_pinned(func: Any, tensor: TensorOfParts, *device: Any, **named_device: Any) -> bool:
    return all(func(part, *device, **named_device) for part in tensor.parts)


def _is_set_to(func: Any, tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if not isinstance(tensor, TensorOfParts) or not isinstance(other, TensorOfParts):
        return False
    return tensor.format == other.format and all(map(func, tensor.parts, other.parts))


def _itself(func: Any, tensor: TensorOfParts) -> TensorOfParts:
    return tensor


# The operators that work on a tensor's memory and not on its values.
MEMORY_OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.record_stream.default: _record_stream,
    aten.is_pinned.default: _is_pinned,
    aten.is_set_to.default: _is_set_to,
    aten.detach_.default: _itself,
    aten.set_.source_Tensor: refuse,
    aten.set_.source_Tensor_storage_offset: refuse,
}
