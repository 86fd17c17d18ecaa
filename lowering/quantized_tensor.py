"""QuantizedTensor: stores the parts of a format and acts as the weight that they stand for.

It is a traceable wrapper subclass: a linear on one is still one node of a traced graph, whose
kernel then takes the parts as they are. Outside compiled code every operation works on the
dequantized values, and one that writes, into it or into a view of it, quantizes its result into the
same parts again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Private, checked on torch 2.11 to 2.15.
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_map_only

from omniq_compile.lowering import written_views
from omniq_compile.lowering.errors import WeightError
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.formats.rows import dequantize_rows
from omniq_compile.lowering.materialized import first_columns
from omniq_compile.lowering.pickled import allow_loading, as_pickled, rebuild
from omniq_compile.lowering.quantize_weight import check_finite, check_weight, quantize_weight
from omniq_compile.lowering.tensor_of_parts import (
    MEMORY_OPERATORS,
    TensorOfParts,
    let_go,
    refuse,
)

aten = torch.ops.aten

allow_loading()  # again, for TORCH_DEVICE_BACKEND_AUTOLOAD=0


@cache
def _traced_code() -> str:
    """Digest what a graph gets of `QuantizedTensor.dequantize`: caches outlive versions of it."""
    folder = Path(__file__).parent
    files = [Path(__file__), folder / "materialized.py", *sorted((folder / "formats").glob("*.py"))]
    code = b"".join(file.read_bytes() for file in files)
    return hashlib.blake2b(code, digest_size=16).hexdigest()


class QuantizedTensor(TensorOfParts):
    """A weight ``[..., N, K]`` as codes and scales.

    Attributes:
        method: as a user spells it, such as ``"mxfp4"``.
        format: that the parts are in, such as ``"mxfp4_uos"``.
        shape, dtype: of the weight that it stands for.

    The parts are attributes too, by the names that the format gives them: ``codes``, ``scale``.
    """

    method: str
    format: str
    # Operations reach __torch_dispatch__ alone, so that Dynamo traces them as on any tensor. This
    # and what ``__new__`` calls is private, and checked on torch 2.11 to 2.15.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        parts: Parts | QuantizedTensor,
        format: str = "",
        method: str = "",
        shape: torch.Size | None = None,
        dtype: torch.dtype | None = None,
        *,
        requires_grad: bool = False,
    ) -> QuantizedTensor:
        """Wrap parts without copying them, or those of another one.

        The latter, with ``requires_grad``, is how accelerate makes a parameter anew when it moves
        one to a device; gradients there are none.
        """
        if isinstance(parts, QuantizedTensor):
            shape, dtype, parts = parts.shape, parts.dtype, parts.parts
        if shape is None:
            raise WeightError(
                f"a QuantizedTensor cannot be made of a {type(parts).__name__} alone, which has no "
                "format. Where accelerate puts values from the disk into a model that is stored "
                "quantized: load them before quantize_(), offload to the CPU's memory, or call "
                "load_state_dict(), which quantizes what it copies."
            )
        # One made under inference_mode could not be detached there, nor written to later.
        with torch.inference_mode(False):
            tensor: QuantizedTensor = torch.Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=parts[0].device
            )
        # C++ that asks for its memory (`to_dlpack`) gets an error, and not a null pointer.
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        return tensor

    def __init__(
        self,
        parts: Parts | QuantizedTensor,
        format: str = "",
        method: str = "",
        shape: torch.Size | None = None,
        dtype: torch.dtype | None = None,
        *,
        requires_grad: bool = False,
    ) -> None:
        """Keep the parts, in the order of the format."""
        if isinstance(parts, QuantizedTensor):
            format, method, parts = parts.format, parts.method, parts.parts
        self.format = format
        self.method = method
        for name, part in zip(get_format(format).parts, parts, strict=True):
            setattr(self, name, part)

    @classmethod
    def from_weight(cls, weight: torch.Tensor, format: str, method: str) -> QuantizedTensor:
        """Quantize ``weight [..., N, K]``, some rows at a time.

        Raises:
            WeightError: it is not a floating matrix, is empty, or holds NaN or Inf.
        """
        check_weight(weight)
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(weight, QuantizedTensor):
                weight = weight.dequantize()
            parts = quantize_weight(weight.detach(), format)
        check_finite(parts, format)
        return cls(parts, format, method, weight.shape, weight.dtype)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The stored tensors, codes first."""
        return tuple(getattr(self, name) for name in get_format(self.format).parts)

    @property
    def data(self) -> torch.Tensor:
        """The same weight, sharing its parts.

        Assigning another `QuantizedTensor` of the same format replaces the parts by its own, which
        may be on another device: so offloading moves a weight. Assigning any other tensor
        quantizes its values into the parts, which have a place for this shape alone.

        Raises:
            WeightError: assigned was a tensor of another shape and not of the same format.
        """
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, QuantizedTensor) or value.format != self.format:
            # copy_ alone would repeat one row of values for all.
            if value.shape != self.shape:
                raise WeightError(
                    f"a weight of shape {list(self.shape)} that is stored as {self.format} cannot "
                    f"take data of shape {list(value.shape)}. Make a new parameter of it."
                )
            with torch.no_grad():
                self.copy_(value)
            return
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.__init__(value.parts, value.format, value.method, value.shape, value.dtype)  # type: ignore[misc]

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:  # type: ignore[override]
        """Return the values it stands for as a plain tensor, of ``dtype`` or its own."""
        dtype = dtype or self.dtype
        form, parts = get_format(self.format), self.parts
        if type(parts[0]) is torch.Tensor:
            written_views.take(self)
            return dequantize_rows(parts, form, self.shape, dtype)
        if isinstance(parts[0], FakeTensor) and get_proxy_mode() is None:
            # Dynamo asks how the result of a linear looks: of values that nobody records, computing
            # them takes as long as the rest of its tracing.
            return parts[0].new_empty(self.shape, dtype=dtype)
        # In a traced graph. Its views are those of a tensor without gaps, which this seems to be.
        return first_columns(form.dequantize(parts).to(dtype), self.shape[-1]).contiguous()

    def numpy(self, *, force: bool = False) -> Any:
        """Return a copy of the values it stands for."""
        return self.dequantize().numpy(force=force)

    def tolist(self) -> Any:
        """Return the values it stands for as lists of numbers."""
        return self.dequantize().tolist()

    def with_parts(self, parts: Parts, dtype: torch.dtype | None = None) -> QuantizedTensor:
        """Return the same weight with other tensors for parts, such as copies on another device."""
        return QuantizedTensor(parts, self.format, self.method, self.shape, dtype or self.dtype)

    def __setitem__(self, index: Any, values: Any) -> None:
        """Write some elements, and quantize the rest again with them."""
        whole = self.dequantize(torch.float32)
        whole[index] = values.dequantize() if isinstance(values, QuantizedTensor) else values
        self.copy_(whole)

    def __repr__(self) -> str:  # type: ignore[override]
        dtype = str(self.dtype).removeprefix("torch.")
        form = "" if self.format == self.method else f" as {self.format}"
        return (
            f"QuantizedTensor({self.method}{form}, {list(self.shape)} of {dtype}, "
            f"{self.nbytes:,} bytes, device='{self.device}')"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the parts, and what the weight is; `rebuild` says how it comes back."""
        return rebuild, (as_pickled(vars(self)), self.shape, self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Name the parts; with `__tensor_unflatten__` this makes the class traceable."""
        return list(get_format(self.format).parts), (self.format, self.method, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], context: Any, size: torch.Size, stride: Any
    ) -> QuantizedTensor:
        format, method, dtype = context
        parts = [inner[name] for name in get_format(format).parts]
        return QuantizedTensor(parts, format, method, size, dtype)

    def _stable_hash_for_caching(self) -> str:
        """Return what AOTAutograd's cache knows the tensor by: all but its values."""
        looks = [(part.shape, part.stride(), part.dtype, part.device) for part in self.parts]
        about = repr((self.format, self.method, self.dtype, self.shape, looks, _traced_code()))
        return hashlib.blake2b(about.encode(), digest_size=16).hexdigest()

    # An operation in a frame that Dynamo leaves to Python, such as one with a graph break in a
    # loop, is no code of the model for it to trace.
    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Keep the parts through moves and copies; do anything else on the values."""
        kwargs = kwargs or {}
        if func not in _HANDLERS:
            # Under inference_mode no autograd took operators such as `to` apart before this.
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for argument in args:
            if isinstance(argument, QuantizedTensor):
                written_views.take(argument)
        handler: Callable[..., Any] = _HANDLERS.get(func, _on_values)
        return handler(func, *args, **kwargs)


def _same_parts(func: Any, tensor: QuantizedTensor, **_: Any) -> QuantizedTensor:
    return tensor.with_parts(tensor.parts)


def _each_part(func: Any, tensor: QuantizedTensor, **kwargs: Any) -> QuantizedTensor:
    kwargs.pop("memory_format", None)
    return tensor.with_parts([func(part, **kwargs) for part in tensor.parts])


def _to(func: Any, tensor: QuantizedTensor, **kwargs: Any) -> torch.Tensor:
    """Move the parts to a device.

    A float dtype changes what the weight dequantizes to; for any other the values are converted.
    """
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    kwargs.pop("memory_format", None)
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise WeightError(
            f"a weight that is stored as {tensor.format} has no values of {dtype}. Where layerwise "
            "casting asks for that, leave enable_layerwise_casting() out: the weight is small "
            "already."
        )
    let_go(tensor)
    if not dtype.is_floating_point:
        return func(tensor.dequantize(), dtype=dtype, **kwargs)  # type: ignore[no-any-return]
    return tensor.with_parts([func(part, **kwargs) for part in tensor.parts], dtype)


def _empty_like(func: Any, tensor: QuantizedTensor, **kwargs: Any) -> torch.Tensor:
    if kwargs.get("dtype") in (None, tensor.dtype):
        kwargs.pop("dtype", None)
        return _each_part(func, tensor, **kwargs)
    return _on_values(func, tensor, **kwargs)  # type: ignore[no-any-return]


def _copy(func: Any, target: Any, source: Any, non_blocking: bool = False) -> Any:
    """Copy parts where both have the same; otherwise quantize the source into the target."""
    if not isinstance(target, QuantizedTensor):
        return func(target, source.dequantize(), non_blocking)
    if isinstance(source, QuantizedTensor):
        if source.format == target.format and source.shape == target.shape:
            for to, part in zip(target.parts, source.parts, strict=True):
                to.copy_(part, non_blocking)
            written_views.renew(target)
            return target
        source = source.dequantize()
    # Quantized aside first: a weight that cannot be quantized leaves the old one whole.
    values = source.to(target.device).expand(target.shape)
    parts = quantize_weight(values, target.format)
    check_finite(parts, target.format)
    for to, part in zip(target.parts, parts, strict=True):
        to.copy_(part)
    written_views.renew(target)
    return target


def _on_values(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on dequantized values, and quantize what it wrote."""
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], QuantizedTensor):
        refuse(func, *args)
    is_view = written_views.is_view(func)
    values: dict[int, torch.Tensor] = {}
    owners: dict[int, QuantizedTensor] = {}

    def value(tensor: QuantizedTensor) -> torch.Tensor:
        if id(tensor) not in values:
            # Under inference_mode too, a view of what is no inference tensor may not be one.
            with torch.inference_mode(False), torch.no_grad():
                values[id(tensor)] = tensor.dequantize()
            if is_view:
                values[id(tensor)] = written_views.watched(tensor, values[id(tensor)])
            owners[id(values[id(tensor)])] = tensor
        return values[id(tensor)]

    plain_args, plain_kwargs = tree_map_only(QuantizedTensor, value, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = kwargs.get(argument.name, args[position] if position < len(args) else None)
        for tensor in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(tensor, QuantizedTensor):
                tensor.copy_(values[id(tensor)])

    def owner(tensor: torch.Tensor) -> torch.Tensor:
        return owners.get(id(tensor), tensor)

    return tree_map_only(torch.Tensor, owner, result)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    **MEMORY_OPERATORS,
    aten.detach.default: _same_parts,
    aten.alias.default: _same_parts,
    aten.clone.default: _each_part,
    aten._pin_memory.default: _each_part,
    aten._to_copy.default: _to,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
    # Taken apart it begins with a view, which would be watched for writes.
    aten.linear.default: _on_values,
}
