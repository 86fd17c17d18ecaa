"""A transformer of your own, of plain PyTorch: what omniq does to it and why, and its error.

python examples/own_model.py --method mxfp8
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

import omniq_compile as omniq

WIDTH, HEADS, TOKENS = 512, 8, 100


class Block(nn.Module):
    """Attention and feed-forward, each shifted and scaled by the step's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 4 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, tokens, width]``."""
        shift, scale, shift_2, scale_2 = self.modulation(step).unsqueeze(1).chunk(4, dim=-1)
        heads = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, HEADS, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attention = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attention.transpose(1, 2).flatten(-2))
        return x + self.feed_forward(self.norm(x) * (1 + scale_2) + shift_2)


class Transformer(nn.Module):
    """A few blocks between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.project_in = nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.project_out = nn.Linear(WIDTH, 16)

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, tokens, 16]``."""
        x = self.project_in(x)
        for block in self.blocks:
            x = block(x, step)
        return self.project_out(x)


@torch.no_grad()
def run(options: dict[str, Any]) -> tuple[omniq.Report, float]:
    """Return what was done, and the relative error of the result beside BF16."""
    torch.manual_seed(0)
    model = Transformer().to(torch.bfloat16).eval()
    inputs = [torch.randn(shape).to(torch.bfloat16) for shape in ((2, TOKENS, 16), (2, WIDTH))]
    report = omniq.explain(model, inputs, options)
    expected = model(*inputs).float()
    compiled = torch.compile(model, backend="omniq", options=options)
    error = (compiled(*inputs).float() - expected).norm() / expected.norm()
    return report, error.item()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="int8")
    # The modulation shapes everything after it, and takes one row a picture.
    parser.add_argument("--ignored-layers", nargs="*", default=["modulation"])
    arguments = parser.parse_args()
    options = {"method": arguments.method, "ignored_layers": arguments.ignored_layers}
    report, error = run(options)
    print(report)
    print(f"relative error beside BF16: {error:.4f}")


if __name__ == "__main__":
    main()
