"""Makes a quantized weight of what was pickled, as ``torch.save`` and sending it to a process do.

``torch.load`` calls nothing by default that was not allowed before. Nothing is imported here before
it is used, so that PyTorch can be told of `rebuild` in every process: see `torch_logs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from omniq_compile.lowering.quantized_tensor import QuantizedTensor


def allow_loading() -> None:
    """Let ``torch.load`` with its default of ``weights_only=True`` call `rebuild`."""
    import torch

    torch.serialization.add_safe_globals([rebuild])


def as_pickled(state: dict[str, Any]) -> dict[str, Any]:
    """Return a weight's attributes as they are pickled: those of a float8 dtype as bytes.

    What ``pickle`` itself writes of such a tensor PyTorch cannot read (2.11 to 2.15).
    """
    import torch

    return {
        name: value.view(torch.uint8)
        if isinstance(value, torch.Tensor) and _is_float8(value.dtype)
        else value
        for name, value in state.items()
    }


def rebuild(state: dict[str, Any], shape: torch.Size, dtype: torch.dtype) -> QuantizedTensor:
    """Return a weight that was pickled.

    Args:
        state: its attributes: the parts by their names, the format, the method.
        shape: ``[..., N, K]``.
        dtype: of the values that it stands for.

    Raises:
        CheckpointError: the parts are not those of such a weight.
    """
    import torch

    from omniq_compile.lowering.errors import CheckpointError, OptionError
    from omniq_compile.lowering.formats import get_format
    from omniq_compile.lowering.quantized_tensor import QuantizedTensor

    # The file may come from anywhere, and kernels trust the parts to be as large as they should.
    try:
        form = get_format(state["format"])
        expected = form.allocate(torch.empty(shape, dtype=dtype, device="meta"))
        parts = [
            _as_stored(state[name].contiguous(), like.dtype)
            for name, like in zip(form.parts, expected, strict=True)
        ]
        fit = all(
            part.shape == like.shape and part.dtype == like.dtype
            for part, like in zip(parts, expected, strict=True)
        )
        tensor = QuantizedTensor(parts, form.name, state["method"], shape, dtype)
    except (KeyError, TypeError, AttributeError, RuntimeError, OptionError) as error:
        raise CheckpointError(f"a pickled weight is damaged: {error!r}. Save it again.") from error
    if not fit:
        raise CheckpointError(
            f"a pickled weight of shape {list(shape)} has parts that do not fit {form.name}: "
            f"{[(list(part.shape), part.dtype) for part in parts]}. Save it again."
        )
    # What else was set on it, such as that it is a parameter.
    vars(tensor).update({name: value for name, value in state.items() if name not in vars(tensor)})
    return tensor


def _as_stored(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Read bytes that `as_pickled` made; files of before hold the parts as they are."""
    import torch

    return part.view(dtype) if part.dtype is torch.uint8 and _is_float8(dtype) else part


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1
