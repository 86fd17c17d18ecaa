"""Random weights under which activations stay of order one and no branch is dead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# Layers that compute shifts, scales and gates. Training starts them at zero (adaLN-Zero) and leaves
# them small; drawn like other layers they would let one error pass through every block.
_MODULATION = re.compile(
    r"(?i:adaln|modulation|film)|_mod(_proj)?\b|norm\w*\.linear|\btime_proj|\btime_projection"
    r"|\bt_block|scale_shift\.linear|to_gamma|to_beta|scale_output|distilled_guidance_layer"
)
_MODULATION_SCALE = 1 / 3

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def redraw(model: nn.Module, scales: Mapping[str, float] | None = None, seed: int = 0) -> None:
    """Draw every parameter anew; none stays zero, as gates and last layers start in training.

    Matrices get a standard deviation of 1 / sqrt(fan-in), embeddings 1 and biases 0.1. The weights
    of norms stay around what they start as, which is 0 where a class adds 1. A parameter that a
    module holds itself is a table of shifts and gates, or a stack of experts ``[experts, K, N]``.
    Layers of modulation get a third, and layers whose names end in a key of ``scales`` that many
    times as much.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: set[int] = set()
    for path, module in model.named_modules():
        scale = next((s for end, s in (scales or {}).items() if path.endswith(end)), None)
        if scale is None:
            scale = _MODULATION_SCALE if _MODULATION.search(path) else 1.0
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in drawn:
                continue
            drawn.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            noise *= _deviation(module, name, parameter)
            if parameter.dim() == 1 and name == "weight":
                parameter.add_(noise)
            else:
                parameter.copy_(noise * scale)


def _deviation(module: nn.Module, name: str, parameter: torch.Tensor) -> float:
    if isinstance(module, nn.Embedding):
        return 1.0
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and name == "weight":
        return float(parameter[0].numel()) ** -0.5
    if parameter.dim() == 1:
        return 0.1
    if parameter.dim() == 3 and min(parameter.shape) > 1:
        return float(parameter.shape[-2]) ** -0.5
    return 0.3


def build(
    cls: Any,
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    scales: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Any:
    """Return a model in eval mode, without gradients, in ``dtype``.

    What diffusers keeps in float32 on loading stays in float32: some layers by name, and buffers
    that are computed and not stored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(**config)
    redraw(model, scales, seed)
    in_float32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if in_float32.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            stored = name not in module._non_persistent_buffers_set
            if stored and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model.eval().requires_grad_(False)
