"""What stands in the way of saving a quantized model, and the way back to a plain one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from omniq_compile.lowering.errors import CheckpointError
from omniq_compile.lowering.quantized_tensor import QuantizedTensor


def refuse_adapters(names: Iterable[str]) -> None:
    """Raise where a state holds a LoRA or an IP-Adapter: nothing would load it.

    Raises:
        CheckpointError: it does.
    """
    names = list(names)
    if any(".processor." in name and "_ip." in name for name in names):
        raise CheckpointError(
            "an IP-Adapter is loaded, and the quantized folder would not load again. Unload it "
            "first with unload_ip_adapter()."
        )
    wrapped = next((name for name in names if ".base_layer." in f".{name}"), None)
    if wrapped is not None:
        layer = wrapped.split(".base_layer.")[0]
        raise CheckpointError(
            f"an adapter (LoRA) is loaded on {layer!r}, and the quantized folder would not load "
            "again. Unload it first with unload_lora_weights(), after fuse_lora() to keep its "
            "effect, and save its own weights apart."
        )


def refuse_fused(model: nn.Module) -> None:
    """Raise where projections of a model of diffusers are fused, which its config does not say.

    Raises:
        CheckpointError: they are.
    """
    fused = (name for name, m in model.named_modules() if getattr(m, "fused_projections", False))
    if (name := next(fused, None)) is not None:
        raise CheckpointError(
            f"the projections of {name!r} are fused, and the quantized folder would not load again."
            " Call unfuse_qkv_projections() first, and fuse them again once it is loaded."
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
