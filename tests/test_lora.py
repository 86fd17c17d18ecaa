"""A LoRA of peft, fused into a model that is already compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(70, 130), nn.Linear(130, 45)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


@torch.no_grad()  # peft turns gradients on again when it merges
def test_a_fused_lora_is_followed_and_so_is_its_removal() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["up", "down"])
    model = peft.get_peft_model(Base(), config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(9, 70)
    options = {"method": "int8", "min_features": 1, "compiler": "eager"}
    run = torch.compile(model, backend="omniq", options=options)

    def error(expected: torch.Tensor) -> float:
        return float((run(x) - expected).norm() / expected.norm())

    with model.disable_adapter():
        plain = model(x)
    adapted = model(x)
    assert (adapted - plain).norm() > 0.3 * plain.norm()
    assert error(adapted) < 0.03  # the adapter's own layers are quantized too
    model.merge_adapter()
    assert error(adapted) < 0.03
    model.unmerge_adapter()
    assert error(adapted) < 0.03
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0)
    assert error(plain) < 0.03
