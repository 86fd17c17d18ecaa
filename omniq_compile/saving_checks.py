"""The way back from a quantized model to a plain one."""

from __future__ import annotations

import torch
from torch import nn

from omniq_compile.lowering.quantized_tensor import QuantizedTensor


def dequantize_weights(model: nn.Module) -> None:
    """Replace every quantized weight by a plain parameter of the values it stands for."""
    plain: dict[int, nn.Parameter] = {}  # by weight, which several layers may share
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, QuantizedTensor):
                if id(parameter) not in plain:
                    values: torch.Tensor = parameter.dequantize()
                    plain[id(parameter)] = nn.Parameter(values, requires_grad=False)
                module._parameters[name] = plain[id(parameter)]
