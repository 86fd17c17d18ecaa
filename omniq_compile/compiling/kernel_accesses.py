"""Remembers what omniq's kernels read and write, which PyTorch asks Triton about again and again.

For every launch in a graph AOTAutograd and Inductor ask three or four times. Each answer takes
Triton compiling the kernel half way, which was two fifths of the time in which a model's code was
generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import cache, wraps
from typing import Any

from torch import Tensor

from omniq_compile.lowering import triton_kernels

# Private to PyTorch: the first is asked in 2.11 and 2.12, the second in 2.13 to 2.15.
_QUESTIONS = ("identify_mutated_tensors", "identify_accessed_tensors")


@cache
def remember() -> None:
    """Let PyTorch get the first answer again wherever it cannot differ, in this process.

    An answer depends on the device code, on the types of pointers and on compile-time parameters.
    Kernels that are not omniq's are asked about as before.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    for name in _QUESTIONS:
        if hasattr(triton_kernel_wrap, name):
            setattr(triton_kernel_wrap, name, _remembering(getattr(triton_kernel_wrap, name)))


def _remembering(ask: Any) -> Any:
    answers: dict[Any, Any] = {}

    @wraps(ask)
    def asked(kernel: Any, kwargs: Mapping[str, Any], tma_descriptor_metadata: Any) -> Any:
        if tma_descriptor_metadata or not _is_own(kernel):
            return ask(kernel, kwargs, tma_descriptor_metadata)
        key = kernel, tuple((name, _kind(kwargs[name])) for name in sorted(kwargs))
        if key not in answers:
            answers[key] = ask(kernel, kwargs, tma_descriptor_metadata)
        return copy(answers[key])  # a list that others may change

    return asked


def _is_own(kernel: Any) -> bool:
    function = kernel
    while hasattr(function, "fn"):  # of triton.autotune and of triton.jit
        function = function.fn
    return str(function.__module__).startswith(f"{triton_kernels.__name__}.")


def _kind(value: Any) -> Any:
    """Return what the device code is told about an argument: a tensor's type, or a value."""
    if isinstance(value, Tensor):
        return "tensor", value.dtype
    if hasattr(value, "get_dtype"):  # a tensor of Inductor's
        return "tensor", value.get_dtype()
    return type(value).__name__, value if isinstance(value, int | float | str) else None
