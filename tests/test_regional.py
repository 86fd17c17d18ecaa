"""`omniq_compile.compile`: one compile a policy, and a policy that knows each block."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import omniq_compile
from omniq_compile.model_blocks import module_blocks
from omniq_compile.models.random_models import make_inputs, random_model

OPTIONS = {"min_features": 1, "compiler": "eager"}
INT8 = {"method": "int8"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.net = nn.ModuleList([nn.Linear(64, 130), nn.Linear(130, 64)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net[1](F.gelu(self.net[0](self.norm(x))))


class Tower(nn.Module):
    """The blocks registered first are run last."""

    def __init__(self, late: int = 3, early: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(38, 64)
        self.late = nn.ModuleList(Block() for _ in range(late))
        self.early = nn.ModuleList(Block() for _ in range(early))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in (*self.early, *self.late):
            x = block(x)
        return x


def tower(**sizes: int) -> Tower:
    return Tower(**sizes).eval().requires_grad_(False)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def _count() -> None:
    counters.clear()


def whole(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    return torch.compile(model, backend="omniq", options=OPTIONS | options)(x)


def test_blocks_of_one_policy_are_compiled_once() -> None:
    model, x = tower(), torch.randn(7, 38)
    exact = model(x)
    expected = whole(copy.deepcopy(model), x, method="int8", ignored_layers=["embed"])
    torch._dynamo.reset()
    counters.clear()
    assert omniq_compile.compile(model, OPTIONS | {"method": "int8"}) is model
    out = model(x)
    assert graphs() == 1
    assert torch.allclose(out, expected, atol=1e-5)
    assert not torch.equal(out, exact)
    assert torch.equal(model(x), out)
    assert graphs() == 1


def test_leading_blocks_are_those_that_run_first() -> None:
    model, x = tower(), torch.randn(7, 38)
    options = {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 3}
    expected = whole(copy.deepcopy(model), x, ignored_layers=["embed"], **options)
    after_early = model.early[1](model.early[0](model.embed(x)))
    after_first_late = model.late[0](after_early)
    torch._dynamo.reset()
    counters.clear()
    omniq_compile.compile(model, OPTIONS | options)
    seen: dict[str, torch.Tensor] = {}
    for name, block in module_blocks(model).items():
        original = block._compiled_call_impl
        block._compiled_call_impl = lambda *a, n=name, f=original: seen.setdefault(n, f(*a))
    out = model(x)
    assert graphs() == 2
    assert torch.equal(seen["early.1"], after_early)
    assert torch.equal(seen["late.0"], after_first_late)
    assert torch.allclose(out, expected, atol=1e-5)


def test_a_full_name_is_known_inside_its_block() -> None:
    model, x = tower(), torch.randn(7, 38)
    ignored = ["late.1.net.0"]
    expected = whole(copy.deepcopy(model), x, method="fp8", ignored_layers=["embed", *ignored])
    torch._dynamo.reset()
    counters.clear()
    omniq_compile.compile(model, OPTIONS | {"method": "fp8", "ignored_layers": ignored})
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert graphs() == 2


def test_a_block_may_have_arguments_of_any_name() -> None:
    class Named(Block):
        def forward(self, x: torch.Tensor, name: str, block: int) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x) * (block + len(name))

    blocks = nn.ModuleList([Named(), Named()]).eval().requires_grad_(False)
    x = torch.randn(7, 64)
    expected = [block(x, name="late", block=2) for block in blocks]
    omniq_compile.compile(blocks, OPTIONS | INT8)
    for block, exact in zip(blocks, expected, strict=True):
        assert torch.allclose(block(x, name="late", block=2), exact, atol=0.2)


def test_one_pattern_for_every_block_is_one_policy() -> None:
    model, x = tower(), torch.randn(7, 38)
    omniq_compile.compile(model, OPTIONS | {"method": "int8", "ignored_layers": ["net.1"]})
    model(x)
    assert graphs() == 1


def test_steps_reach_every_block() -> None:
    model, x = tower(), torch.randn(7, 38)
    omniq_compile.compile(model, OPTIONS | {"method": "mxfp4", "w4a8_fallback_steps": [0]})
    with pytest.raises(omniq_compile.OptionError, match="denoise_step"):
        model(x)
    outputs = []
    for step in (0, 1):
        with omniq_compile.denoise_step(step):
            outputs.append(model(x))
    assert not torch.equal(*outputs)


def test_a_model_without_repeated_blocks_is_an_error() -> None:
    with pytest.raises(omniq_compile.OptionError, match="no repeated blocks"):
        omniq_compile.compile(nn.Sequential(nn.Linear(64, 64), nn.GELU()), {"method": "int8"})


@pytest.mark.parametrize(
    ("mode", "words"),
    [("max-autotune", "only compiler 'inductor' reads"), ("max_autotune", "'max-autotune'")],
)
def test_a_mode_that_does_nothing_is_an_error(mode: str, words: str) -> None:
    with pytest.raises(omniq_compile.OptionError, match=words):
        omniq_compile.compile(tower(), OPTIONS | {"method": "int8"}, mode=mode)


def test_a_pattern_that_matches_nothing_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "omniq"):
        omniq_compile.compile(tower(), {"method": "int8", "ignored_layers": ["erly.0"]})
    assert "'erly.0' matches no layer of the model; nearest: early" in caplog.text


def test_patterns_that_match_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Inside a block they are names of its modules, of which some, such as a norm, are no site."""
    options = {"method": "mxfp4", "ignored_layers": ["late"], "w4a8_fallback_layers": ["early.0"]}
    with caplog.at_level(logging.WARNING, "omniq"):
        omniq_compile.compile(tower(), OPTIONS | options)(torch.randn(7, 38))
    assert [r.getMessage() for r in caplog.records if r.name == "omniq"] == []
    assert graphs() == 3


@pytest.mark.parametrize(
    ("class_name", "containers"),
    [
        ("QwenImageTransformer2DModel", {"transformer_blocks"}),
        ("WanTransformer3DModel", {"blocks"}),
        ("ZImageTransformer2DModel", {"noise_refiner", "context_refiner", "layers"}),
        ("FluxTransformer2DModel", {"transformer_blocks", "single_transformer_blocks"}),
    ],
)
def test_the_blocks_of_diffusers_models_are_found(class_name: str, containers: set[str]) -> None:
    model = random_model(class_name, width=64, num_blocks=2)
    blocks = module_blocks(model)
    assert {name.rpartition(".")[0] for name in blocks} == containers
    inputs = make_inputs(model, image_tokens=16, text_tokens=8)
    omniq_compile.compile(
        model, OPTIONS | {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1}
    )
    with torch.no_grad():
        model(**inputs)
    assert graphs() >= 2


def test_blocks_of_torchs_own_class_are_compiled_too() -> None:
    """Dynamo skips the calls of torch's own modules, which would leave these blocks in BF16."""
    blocks = (nn.Sequential(nn.Linear(64, 130), nn.GELU(), nn.Linear(130, 64)) for _ in range(3))
    model = nn.Sequential(nn.Linear(38, 64), nn.ModuleList(blocks)).requires_grad_(False)
    x = torch.randn(5, 64)
    expected = [block(x) for block in model[1]]
    compiled = omniq_compile.compile(model, {"method": "int8", **OPTIONS})
    with torch.no_grad():
        got = [block(x) for block in compiled[1]]
    assert graphs() == 1
    for one, other in zip(got, expected, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0, atol=0.05)


def compile_each(model: nn.Module, **options: Any) -> None:
    """Compile every block on its own, as diffusers' ``compile_repeated_blocks`` does."""
    for block in module_blocks(model).values():
        block.compile(backend="omniq", options=OPTIONS | options)


class Adapted(nn.Module):
    """A layer with an adapter, named as peft's is."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 4)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, layer.out_features)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x)
        return out + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("pattern", ["net", "net.0", "late.0"])
def test_an_adapter_that_is_loaded_after_a_call_is_kept_with_its_layer(pattern: str) -> None:
    model, x = tower(late=2, early=0), torch.randn(7, 38)
    plain = copy.deepcopy(model)
    omniq_compile.compile(model, OPTIONS | INT8 | {"ignored_layers": [pattern, "net.1", "late.1"]})
    assert torch.equal(model(x), plain(x))
    for each, late in ((model, model.late), (plain, plain.late)):
        torch.manual_seed(0)
        for block in late:
            block.net[0] = Adapted(block.net[0])
        each.requires_grad_(False)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(
    ("method", "option", "pattern"),
    [
        ("int8", "ignored_layers", "late.1"),
        ("int8", "ignored_layers", "early.0.net.1"),
        ("int8", "ignored_layers", r"re:late\.\d+\.net\.0"),
        ("mxfp4", "w4a8_fallback_layers", "late.2.net.1"),
    ],
)
def test_a_block_compiled_alone_refuses_full_names(method: str, option: str, pattern: str) -> None:
    model = tower()
    compile_each(model, method=method, **{option: [pattern]})
    with pytest.raises(BackendCompilerFailed, match=r"omniq_compile\.compile") as error:
        model(torch.randn(7, 38))
    assert repr(pattern) in str(error.value)


@pytest.mark.parametrize("pattern", ["net.1", "net", "embed", "nothing", "re:net.0"])
def test_a_block_compiled_alone_takes_what_means_the_same_in_each(pattern: str) -> None:
    model, x = tower(), torch.randn(7, 38)
    exact = model(x)
    compile_each(model, method="int8", ignored_layers=[pattern])
    out = model(x)
    assert graphs() == 1
    assert torch.equal(out, exact) == (pattern == "net")


def test_a_block_compiled_alone_takes_activations_of_the_same_layer_in_each() -> None:
    plain, x, outputs = tower(), torch.randn(7, 38), []
    for layers in ([], ["net.1"]):
        model = copy.deepcopy(plain)
        compile_each(model, method="mxfp4", w4a8_fallback_layers=layers)
        outputs.append(model(x))
    assert not torch.equal(*outputs)


def test_a_full_name_of_what_is_kept_anyway_is_taken() -> None:
    model, x = tower(), torch.randn(7, 38)
    exact = model(x)
    compile_each(model, method="int8", min_features=1000, ignored_layers=["late.1"])
    assert torch.equal(model(x), exact)


def test_a_wrapped_block_refuses_full_names_too() -> None:
    model = tower()
    options = OPTIONS | {"method": "int8", "ignored_layers": ["late.1.net.0"]}
    for stack in (model.early, model.late):
        for i, block in enumerate(stack):
            stack[i] = torch.compile(block, backend="omniq", options=options)
    with pytest.raises(BackendCompilerFailed, match=r"names late\.1\.net\.0 of Tower"):
        model(torch.randn(7, 38))


def test_arguments_that_torch_compile_does_not_get_are_refused() -> None:
    with pytest.raises(omniq_compile.OptionError, match="takes no argument 'backend'"):
        omniq_compile.compile(Tower(), OPTIONS | {"method": "int8"}, backend="inductor")
    with pytest.raises(omniq_compile.OptionError, match=r"'fullgrap'\. Did you mean 'fullgraph'\?"):
        omniq_compile.compile(Tower(), OPTIONS, fullgrap=True)


def test_a_model_that_is_compiled_whole_is_refused() -> None:
    inside = Tower()
    inside.compile(backend="eager")
    for model in (torch.compile(Tower(), backend="eager"), inside):
        with pytest.raises(omniq_compile.OptionError, match="compiled as a whole already"):
            omniq_compile.compile(model, OPTIONS | {"method": "int8"})


def in_place(model: nn.Module) -> Any:
    model.compile(backend="eager")
    return model


WHOLE = {
    "its own compile": in_place,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "omniq": lambda model: torch.compile(model, backend="omniq", options=OPTIONS | INT8),
    "a module around it": lambda model: in_place(nn.Sequential(nn.Identity(), model)),
    "a function around it": lambda model: torch.compile(lambda x: model(x) * 2, backend="eager"),
}


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("way", WHOLE)
def test_a_model_that_is_compiled_whole_afterwards_refuses(way: str, ran_before: bool) -> None:
    model, x = omniq_compile.compile(tower(), OPTIONS | INT8), torch.randn(7, 38)
    if ran_before:
        model(x)
    whole = WHOLE[way](model)
    for _ in range(2):
        with pytest.raises(omniq_compile.OptionError, match="Tower was compiled by omniq_compile"):
            whole(x)


def test_the_reason_is_shown_where_graphs_may_not_break() -> None:
    model = omniq_compile.compile(tower(), OPTIONS | INT8)
    model.compile(backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile it in one way only"):
        model(torch.randn(7, 38))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_not_compiled_and_may_be(copied: Any) -> None:
    model, x = tower(), torch.randn(7, 38)
    exact = model(x)
    omniq_compile.compile(model, OPTIONS | INT8)
    quantized = model(x)
    again = copied(model)
    assert torch.equal(again(x), exact)
    assert torch.equal(torch.compile(copied(model), backend="eager", fullgraph=True)(x), exact)
    assert torch.equal(omniq_compile.compile(again, OPTIONS | INT8)(x), quantized)
    again.compile(backend="eager")
    with pytest.raises(omniq_compile.OptionError, match="Tower was compiled by omniq_compile"):
        again(x)


def test_compiling_anew_adds_no_second_hook() -> None:
    model = tower()
    for method in ("int8", "fp8", "mxfp8"):
        omniq_compile.compile(model, OPTIONS | {"method": method})
    assert len(model._forward_pre_hooks) == 1


def test_a_compiled_model_is_still_explained_and_exported() -> None:
    model, x = tower(), torch.randn(7, 38)
    expected = omniq_compile.explain(model, (x,), OPTIONS | INT8)
    exact = model(x)
    omniq_compile.compile(model, OPTIONS | INT8)
    found = omniq_compile.explain(model, (x,), OPTIONS | INT8)
    assert [s.layer for s in found.sites] == [s.layer for s in expected.sites]
    assert torch.equal(torch.export.export(model, (x,)).module()(x), exact)


@pytest.mark.parametrize("function", ["compile", "quantize_", "explain"])
def test_a_pipeline_is_no_model_and_its_models_are_named(function: str) -> None:
    class Pipe:
        def __init__(self) -> None:
            models = {"transformer": Tower(), "vae": nn.Linear(1, 1)}
            self.components = {"scheduler": object(), **models}

    arguments = ((),) if function == "explain" else ()
    with pytest.raises(omniq_compile.OptionError) as caught:
        getattr(omniq_compile, function)(Pipe(), *arguments, OPTIONS | {"method": "int8"})
    assert str(caught.value) == (
        f"omniq_compile.{function} takes a torch.nn.Module, not a Pipe. Pass one of its models: "
        "pipe.transformer, pipe.vae."
    )


def test_one_tensor_is_one_input() -> None:
    report = omniq_compile.explain(
        nn.Linear(64, 64).requires_grad_(False), torch.randn(3, 64), OPTIONS | {"method": "int8"}
    )
    assert [site.M for site in report.rewritten] == [3]
