"""How programs for NVIDIA GPUs read rows that are quantized: once, and what they store of them."""

from __future__ import annotations

import re
from math import prod

import pytest
import torch
from generated_cuda import BF16, launches, make
from torch.nn import functional

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")

ROWS = 150


class Normed(torch.nn.Module):
    """A layer behind a norm, whose rows are longer than Inductor holds by itself."""

    def __init__(self, width: int = 3072) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width, elementwise_affine=False)
        self.layer = torch.nn.Linear(width, 256)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(self.norm(x) * (1 + shift))
        return out


@pytest.mark.parametrize(
    ("variant", "arch"),
    [
        ("int8", "sm_90"),
        ("fp8", "sm_90"),
        ("fp8 block-wise", "sm_90"),
        ("mxfp8", "sm_100"),
        ("mxfp4", "sm_100"),
        ("mxfp4_dualscale", "sm_100"),
    ],
)
def test_an_activation_behind_a_norm_is_stored_as_codes_alone(variant: str, arch: str) -> None:
    inputs = torch.randn(1, ROWS, 3072).to(BF16), torch.randn(3072).to(BF16)
    program = make(Normed(), inputs, variant, f"cuda:{arch}").program
    made = re.findall(r"empty_strided_cuda\(\(([\d, ]+)\), .*, torch\.(\w+)\)", program)
    sizes = [(prod(map(int, re.findall(r"\d+", shape))), dtype) for shape, dtype in made]
    whole = [(size / (ROWS * 3072), dtype) for size, dtype in sizes if size >= ROWS * 3072 / 2]
    codes = {"int8": (1, "int8"), "mxfp4": (0.5, "uint8"), "mxfp4_dualscale": (0.5, "uint8")}
    assert whole == [codes.get(variant, (1, "float8_e4m3fn"))]


def loops(width: int) -> tuple[int, int]:
    """Count the kernels that quantize behind a norm, and their loops over a row."""
    inputs = torch.randn(1, 40, width).to(BF16), torch.randn(width).to(BF16)
    program = make(Normed(width), inputs, "int8", "cuda:sm_90").program
    return launches(program)[0], program.count("for r0_offset in")


def test_a_row_is_read_once_and_held() -> None:
    assert [loops(width) for width in (1056, 16384)] == [(1, 0)] * 2
    # Longer ones are cut where there are few of them.
    assert loops(16416)[0] > 1
    # Mean and variance, amax, and codes.
    with torch._inductor.config.patch("triton.persistent_reductions", False):
        assert loops(1056) == (1, 3)


def test_the_choices_of_others_are_kept() -> None:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        pass

    with V.set_choices_handler(Choices()):
        assert loops(1056) == (1, 3)
    assert type(V.choices) is InductorChoices


def test_a_gelu_is_computed_once() -> None:
    class Down(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(12288, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(functional.gelu(x, approximate="tanh"))
            return out

    for variant in ("int8", "fp8", "fp8 block-wise", "mxfp8", "mxfp4"):
        case = make(Down(), (torch.randn(1, 150, 12288).to(BF16),), variant, "cuda:sm_90")
        assert case.program.count("libdevice.exp2(") == 1
        assert "tanh" not in case.program
        made = re.findall(r"empty_strided_cuda\(\(([\d, ]+)\), .*, torch\.(\w+)\)", case.program)
        sizes = [(prod(map(int, re.findall(r"\d+", shape))), dtype) for shape, dtype in made]
        assert (150 * 12288, "float32") not in sizes


@pytest.mark.parametrize(("variant", "arch"), [("fp8", "sm_90"), ("int8", "sm_100")])
def test_the_channels_of_one_picture_are_stored_as_rows(variant: str, arch: str) -> None:
    """As cuBLASLt reads codes, and nothing copies them to be so."""

    class Patches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(256, 384)

        def forward(self, channels: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(channels.flatten(2).transpose(1, 2))
            return out

    case = make(Patches(), (torch.randn(1, 256, 64, 64).to(BF16),), variant, f"cuda:{arch}")
    made = re.findall(r"empty_strided_cuda\(\((4096, 256)\), \(([\d, ]+)\)", case.program)
    assert made == [("4096, 256", "256, 1")]


@pytest.mark.parametrize(
    ("variant", "arch"), [("fp8", "sm_89"), ("fp8", "sm_100"), ("mxfp8", "sm_100")]
)
def test_a_column_that_became_a_row_is_stored_as_a_row(variant: str, arch: str) -> None:
    """`torch._scaled_mm` refuses the strides (1, 1), which PyTorch takes for contiguous."""

    class Column(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(256, 384)

        def forward(self, column: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(column.t())
            return out

    case = make(Column(), (torch.randn(256, 1).to(BF16),), variant, f"cuda:{arch}")
    assert launches(case.program)[1] == {"extern_kernels._scaled_mm": 1}
