"""What layers are called is as the model has it, in any graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import OPTIONS, sites
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import omniq_compile
from omniq_compile import OptionError, quantize_

WIDTH = 32


def kept(model: nn.Module, **options: Any) -> dict[str, bool]:
    found = sites(model, torch.randn(4, WIDTH).bfloat16(), **options)
    return {site.layer: site.decision.method is None for site in found}


def is_as_it_was(compiled: Callable[..., Any], model: nn.Module) -> bool:
    x = torch.randn(4, WIDTH).bfloat16()
    with torch.no_grad():
        return torch.equal(compiled(x), model(x))


def ready(model: nn.Module) -> nn.Module:
    return model.bfloat16().eval().requires_grad_(False)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH)


def mixed(context: Part, x: Part, activation: torch.Tensor) -> torch.Tensor:
    """As SD3's `block_mixing`: it calls both by its own variables."""
    made = context.qkv(activation)
    torch._dynamo.graph_break()
    return x.qkv(made)


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.context_block, self.x_block = Part(), Part()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + mixed(self.context_block, self.x_block, x)


class Net(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.joint_blocks = nn.ModuleList([block(), block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.joint_blocks:
            x = block(x)
        return x


def test_a_function_that_is_handed_modules_behind_a_break() -> None:
    model = ready(Net(Joint))
    assert kept(model) == {"context_block.qkv": False, "x_block.qkv": False}
    assert kept(model, ignored_layers=["x_block"]) == {
        "context_block.qkv": False,
        "x_block.qkv": True,
    }


@pytest.mark.parametrize(
    ("ignored", "same"),
    [(["context_block", "x_block"], True), (["x_block"], False), (["joint_blocks"], True)],
)
def test_its_layers_are_ignored_where_blocks_are_compiled(ignored: list[str], same: bool) -> None:
    model, x = ready(Net(Joint)), torch.randn(4, WIDTH).bfloat16()
    with torch.no_grad():
        expected = model(x)
        compiled = omniq_compile.compile(model, OPTIONS | {"ignored_layers": ignored})
        assert torch.equal(compiled(x), expected) is same


class Cached(nn.Module):
    """As cache-dit's blocks, which hold the model that holds them for the time of its call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.part = model, Part()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part.qkv(x)


@pytest.mark.parametrize(("ignored", "same"), [("joint_blocks.1.part", True), ("model", False)])
def test_a_block_may_hold_its_model(ignored: str, same: bool) -> None:
    model = ready(Net(Part))
    model.joint_blocks[0] = nn.Identity()  # type: ignore[operator]
    model.joint_blocks[1] = ready(Cached(model))  # type: ignore[operator]
    options = OPTIONS | {"ignored_layers": [ignored]}
    assert is_as_it_was(torch.compile(model, backend="omniq", options=options), model) is same


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.to_q(x)
        torch._dynamo.graph_break()
        return self.to_k(q)


class Crossing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn2(self.attn1(x))


def test_a_break_inside_a_block_leaves_its_layers_their_names() -> None:
    model = ready(Net(Crossing))
    x = torch.randn(4, WIDTH).bfloat16()
    with torch.no_grad():
        expected = model(x)
        options = OPTIONS | {"ignored_layers": ["attn1", "attn2"]}
        assert torch.equal(omniq_compile.compile(model, options)(x), expected)


def test_layers_that_are_compiled_once_are_not_told_apart_silently() -> None:
    model = ready(Net(Crossing))
    compiled = omniq_compile.compile(model, OPTIONS | {"ignored_layers": ["attn1.to_k"]})
    with pytest.raises(BackendCompilerFailed) as raised, torch.no_grad():
        compiled(torch.randn(4, WIDTH).bfloat16())
    assert isinstance(raised.value.inner_exception, OptionError)
    words = "ignored_layers names attn1.to_k of Crossing and not attn2.to_k, and a graph break in"
    assert words in str(raised.value.inner_exception)


class Preparation:
    """No module, as LTX-2's preprocessors: a second way to layers of the model."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        self.first, self.second = first, second

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Prepared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patchify_proj = nn.Linear(WIDTH, WIDTH)
        self.adaln_single = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.preparation = Preparation(self.patchify_proj, self.adaln_single)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.preparation(x))


def test_layers_that_a_plain_object_holds_too() -> None:
    model = ready(Prepared())
    ignored = ["adaln_single", "re:patchify_proj"]
    names = ["patchify_proj", "adaln_single.1", "out"]
    assert list(kept(model)) == names
    assert kept(model, ignored_layers=ignored) == dict(zip(names, [True, True, False], strict=True))
    rows = quantize_(model, OPTIONS | {"ignored_layers": ignored})
    assert {row.layer: row.method is None for row in rows} == {
        "patchify_proj": True, "adaln_single.1": True, "out": False,
    }  # fmt: skip


def test_a_weight_of_several_layers_is_named_by_that_which_a_plain_object_holds() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedded, inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            inner.weight = self.embedded.weight
            self.proj_in = nn.Sequential(nn.Sequential(inner), nn.SiLU())
            self.preparation = Preparation(*self.proj_in)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.preparation(x)

    model = ready(Tied())
    assert kept(model) == {"proj_in.0.0": False}
    assert kept(model, ignored_layers=["proj_in"]) == {"proj_in.0.0": True}


def test_a_function_of_a_model_names_layers_as_the_model_does() -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ready(Net(Attention))

        def sample(self, options: dict[str, Any]) -> bool:
            net = self.net
            return is_as_it_was(
                torch.compile(lambda x: net(x), backend="omniq", options=options), net
            )

    whole = OPTIONS | {"ignored_layers": [r"re:joint_blocks\.\d\.to_[qk]", "to_q", "to_k"]}
    assert Trainer().sample(whole)


@pytest.mark.parametrize("compiled", [(), (0,), (0, 1)])
def test_what_torch_compile_wraps_is_no_part_of_a_name(compiled: tuple[int, ...]) -> None:
    """Blocks that a user has compiled are read as they were before."""
    model = ready(Net(Prepared))
    for index in compiled:
        model.joint_blocks[index] = torch.compile(model.joint_blocks[index])
    names = [
        f"joint_blocks.{i}.{n}" for i in "01" for n in ("patchify_proj", "adaln_single.1", "out")
    ]
    assert list(kept(model)) == names
    ignored = kept(model, ignored_layers=["joint_blocks.1.adaln_single"])
    assert [name for name, is_kept in ignored.items() if is_kept] == [names[4]]


def test_an_activation_checkpoint_is_no_part_of_a_name() -> None:
    model = ready(nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(WIDTH, WIDTH)))))
    assert list(kept(model)) == ["0.0"]
    assert list(model.state_dict()) == ["0.0.weight", "0.0.bias"]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.last(x)


@pytest.mark.parametrize(
    ("patterns", "warned"), [(["last"], 0), (["first"], 0), (["last", "lasts"], 2)]
)
def test_a_pattern_of_another_graph_is_not_reported(
    patterns: list[str], warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    options = OPTIONS | {"ignored_layers": patterns}
    compiled = torch.compile(ready(Broken()), backend="omniq", options=options)
    with torch.no_grad():
        compiled(torch.randn(4, WIDTH).bfloat16())
    assert sum("matches none of" in record.getMessage() for record in caplog.records) == warned


def test_full_names_are_the_nearest_to_a_regular_expression(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = OPTIONS | {"ignored_layers": ["re:patchify"]}
    compiled = torch.compile(ready(Prepared()), backend="omniq", options=options)
    with torch.no_grad():
        compiled(torch.randn(4, WIDTH).bfloat16())
    assert "of this graph's 3 layers; nearest: patchify_proj" in caplog.text
