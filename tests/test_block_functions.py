"""Which blocks of a model share what is compiled, and PyTorch's limit of recompilations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch._dynamo.utils import counters

import omniq_compile

OPTIONS = {"method": "int8", "min_features": 1, "compiler": "eager"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(64, 130), nn.Linear(130, 64)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net[1](F.gelu(self.net[0](x)))


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def _count() -> None:
    counters.clear()


def test_policies_do_not_use_up_one_anothers_recompilations() -> None:
    model = nn.Sequential(nn.Sequential(Block(), Block(), Block())).requires_grad_(False)
    exact = copy.deepcopy(model)
    ignored = ["0.0.net.0", "0.1.net.1"]
    omniq_compile.compile(model, OPTIONS | {"ignored_layers": ignored})
    # Static sizes, a symbolic number of rows, and two ranks more: three policies of four graphs.
    with torch._dynamo.config.patch(recompile_limit=4):
        for shape in ((7, 64), (9, 64), (2, 5, 64), (1, 2, 3, 64)):
            x = torch.randn(shape)
            assert not torch.equal(model(x), exact(x)), f"nothing is quantized for {shape}"
    assert graphs() == 12


class Broken(Block):
    """A block whose method Dynamo compiles on its own, for all blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.net[0](x)
        torch._dynamo.graph_break()
        return x + self.net[1](F.gelu(out))


@pytest.mark.parametrize("kind", [Block, Broken])
def test_only_beside_a_graph_break_the_number_of_policies_is_limited(kind: type[Block]) -> None:
    model = nn.Sequential(nn.Sequential(kind(), kind(), kind())).requires_grad_(False)
    exact, x = copy.deepcopy(model[0]), torch.randn(7, 64)
    options = OPTIONS | {"ignored_layers": ["0.0.net.0", "0.1.net.1"]}

    def call() -> None:
        for block, slow in zip(model[0], exact, strict=True):
            assert not torch.equal(block(x), slow(x))

    with torch._dynamo.config.patch(recompile_limit=2):
        omniq_compile.compile(model, options)
        if kind is Broken:
            with pytest.raises(BackendCompilerFailed, match="3 different policies to blocks of Br"):
                call()
            torch._dynamo.config.recompile_limit = 3
        call()
        before = graphs()
        call()
        assert graphs() == before


def test_arguments_of_torch_compile_reach_each_block() -> None:
    model = nn.Sequential(nn.Sequential(Broken(), Broken())).requires_grad_(False)
    omniq_compile.compile(model, OPTIONS, fullgraph=True)
    with pytest.raises(Unsupported, match="graph_break"):
        model(torch.randn(7, 64))


def test_sizes_of_blocks_do_not_use_up_one_anothers_recompilations() -> None:
    """As in a UNet, whose blocks of one class are as wide as their resolution wants."""
    widths = [64, 70, 76, 82, 88, 94]
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(*w)) for w in pairwise(widths))
    model.requires_grad_(False)
    exact = copy.deepcopy(model.blocks)
    omniq_compile.compile(model, OPTIONS)
    x = torch.randn(7, 64)
    with torch._dynamo.config.patch(recompile_limit=2):
        for block, slow in zip(model.blocks, exact, strict=True):
            assert not torch.equal(block(x), slow(x)), f"nothing is quantized in {slow}"
            x = slow(x)


class Doubled(Block):
    """A block of another class, as wide as those beside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_classes_of_blocks_do_not_use_up_one_anothers_recompilations() -> None:
    model = nn.Sequential(nn.Sequential(Block(), Doubled(), Block(), Doubled()))
    model.requires_grad_(False)
    exact = copy.deepcopy(model)
    omniq_compile.compile(model, OPTIONS)
    x = torch.randn(7, 64)
    with torch._dynamo.config.patch(recompile_limit=1):
        for block, slow in zip(model[0], exact[0], strict=True):
            assert not torch.equal(block(x), slow(x)), f"nothing is quantized in {slow}"


class NumberedBlock(Block):
    """A block that knows its number, and may or may not read it."""

    def __init__(self, number: int, reads: bool) -> None:
        super().__init__()
        self.number, self.reads = number, reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out * (self.number + 1) if self.reads else out


def numbered(numbers: Sequence[int], reads: bool) -> nn.Sequential:
    blocks = nn.Sequential(*(NumberedBlock(number, reads) for number in numbers))
    return nn.Sequential(blocks).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("numbers", "reads", "compiles"),
    [(range(6), True, 6), (range(6), False, 1), ([0, 1, 0, 1, 0, 1], True, 2)],
)
def test_blocks_compile_for_the_number_that_they_read(
    numbers: Sequence[int], reads: bool, compiles: int
) -> None:
    model = numbered(numbers, reads)
    exact = copy.deepcopy(model)[0]
    omniq_compile.compile(model, OPTIONS)
    x = torch.randn(7, 64)
    with torch._dynamo.config.patch(recompile_limit=2):
        for block, slow in zip(model[0], exact, strict=True):
            expected = slow(x)
            out = block(x)
            assert not torch.equal(out, expected), f"nothing is quantized in {slow.number}"
            assert torch.linalg.norm(out - expected) < 0.02 * torch.linalg.norm(expected)
            x = expected / expected.std()
    assert graphs() == compiles


def test_inputs_that_look_different_do_not_part_blocks() -> None:
    """As where the first block gets a picture's channels transposed, and the others rows."""
    model = numbered(range(5), reads=False)
    omniq_compile.compile(model, OPTIONS)
    for block in model[0]:
        block(torch.randn(64, 7).t() if block.number == 0 else torch.randn(7, 64))
    assert graphs() == 2


class Activated(Block):
    """A block that is given the module it applies between its layers."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net[1](self.activation(self.net[0](x)))


def test_modules_in_blocks_do_not_use_up_one_anothers_recompilations() -> None:
    blocks = (Activated(kind()) for kind in (nn.SiLU, nn.Tanh, nn.Softsign, nn.Sigmoid))
    model = nn.Sequential(nn.Sequential(*blocks)).requires_grad_(False)
    exact, x = copy.deepcopy(model), torch.randn(7, 64)
    omniq_compile.compile(model, OPTIONS)
    with torch._dynamo.config.patch(recompile_limit=2):
        for block, slow in zip(model[0], exact[0], strict=True):
            assert not torch.equal(block(x), slow(x)), f"nothing is quantized in {slow}"


def test_a_hook_of_one_block_does_not_part_the_others() -> None:
    model = numbered(range(4), reads=False)
    omniq_compile.compile(model, OPTIONS)
    model[0][1].register_forward_hook(lambda block, args, out: out * 2)
    for block in model[0]:
        block(torch.randn(7, 64))
    assert graphs() == 2


class Masked(Block):
    """A block that is given more than it reads."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", ["sparse_csr", "nested"])
def test_inputs_without_strides_or_sizes_are_taken(layout: str) -> None:
    mask = torch.eye(7).to_sparse_csr()
    if layout == "nested":
        mask = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    model = nn.Sequential(nn.ModuleList([Masked(), Masked()])).eval().requires_grad_(False)
    exact = copy.deepcopy(model)
    omniq_compile.compile(model, OPTIONS)
    x = torch.randn(7, 64)
    for block, slow in zip(model[0], exact[0], strict=True):
        assert 0 < torch.linalg.norm(block(x, mask) - slow(x, mask)) < 0.02 * torch.linalg.norm(x)


def test_hooks_of_a_block_are_those_that_it_has_at_a_call() -> None:
    """Dynamo looks for new ones only where the compiled module itself is called."""
    model = nn.Sequential(nn.ModuleList([Block(), Block(), Block()])).requires_grad_(False)
    exact, x = copy.deepcopy(model), torch.randn(7, 64)

    def near(block: nn.Module, expected: torch.Tensor) -> bool:
        return bool(torch.linalg.norm(block(x) - expected) < 0.02 * torch.linalg.norm(expected))

    omniq_compile.compile(model, OPTIONS)
    first, second, third = model[0]
    slow = [block(x) for block in exact[0]]
    with torch._dynamo.config.patch(recompile_limit=1):
        assert all(map(near, model[0], slow))
        assert graphs() == 1
        seen: list[torch.Size] = []
        twice = second.register_forward_hook(lambda block, args, out: out * 2)
        third.register_forward_pre_hook(lambda block, args: seen.append(args[0].shape))
        for _ in range(2):
            assert near(first, slow[0])
            assert near(second, slow[1] * 2)
            assert near(third, slow[2])
        assert seen == [x.shape] * 2
        twice.remove()
        assert near(second, slow[1])
    assert graphs() == 3
