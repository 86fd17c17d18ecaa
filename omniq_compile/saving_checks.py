"""What stands in the way of saving a quantized model, and the way back to a plain one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from omniq_compile.lowering.errors import CheckpointError
from omniq_compile.lowering.quantized_tensor import QuantizedTensor


def refuse_adapters(names: Iterable[str]) -> None:
    """Raise where a state holds a layer that peft has wrapped: nothing would load it.

    Raises:
        CheckpointError: it does.
    """
    wrapped = next((name for name in names if ".base_layer." in f".{name}"), None)
    if wrapped is not None:
        layer = wrapped.split(".base_layer.")[0]
        raise CheckpointError(
            f"an adapter (LoRA) is loaded on {layer!r}, and the quantized folder would not load "
            "again. Unload it first with unload_lora_weights(), after fuse_lora() to keep its "
            "effect, and save its own weights apart."
        )


def dequantize_weights(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every quantized weight by a plain parameter of the values it stands for.

    Args:
        model: any module.
        dtype: of the parameters; None is what each weight stands for.
    """
    plain: dict[int, nn.Parameter] = {}  # by weight, which several layers may share
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, QuantizedTensor):
                if id(parameter) not in plain:
                    values: torch.Tensor = parameter.dequantize(dtype)
                    plain[id(parameter)] = nn.Parameter(values, requires_grad=False)
                module._parameters[name] = plain[id(parameter)]
