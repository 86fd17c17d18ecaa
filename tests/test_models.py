"""Models that commands make up, of every family, and the MODEL argument: presets and functions."""

import inspect
import sys

import diffusers
import pytest
import torch
from tiny_models import tiny_model
from torch.utils._pytree import tree_leaves

from omniq_compile.lowering.errors import OmniqError
from omniq_compile.models.argument import find_model
from omniq_compile.models.families import FAMILIES
from omniq_compile.models.random_models import make_inputs, random_model

QWEN = "QwenImageTransformer2DModel"
# 64 image tokens are 8 x 8; the last three put patches of 2 x 2 back in place.
TINY_OUTPUT = {
    QWEN: (1, 64, 64),
    "FluxTransformer2DModel": (1, 64, 64),
    "WanTransformer3DModel": (1, 16, 1, 16, 16),
    "ZImageTransformer2DModel": (16, 1, 16, 16),
}


def output_of(loaded):
    with torch.no_grad():
        (y,) = tree_leaves(loaded.run())
    return y


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_runs_in_bfloat16(name):
    loaded = tiny_model(name)
    y = output_of(loaded)
    assert y.shape == TINY_OUTPUT[name]
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
    assert 0.5 < y.float().std() < 2
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_of_order_one(name):
    loaded = tiny_model(name, dtype=torch.float32)
    seen = {}

    def record(layer_name):
        def hook(module, arguments, output):
            seen[layer_name] = float(output.std())

        return hook

    for layer_name, module in loaded.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(record(layer_name))
    output_of(loaded)
    assert {k: v for k, v in seen.items() if not 0.1 < v < 5} == {}


@pytest.mark.parametrize("name", FAMILIES)
def test_seed_decides_weights_and_inputs(name):
    state = torch.get_rng_state()
    same, again, other = (output_of(tiny_model(name, seed=s)) for s in (0, 0, 1))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_have_the_tokens_asked_for(name):
    model = random_model(name, width=64, num_blocks=2, dtype=torch.float32)
    inputs = make_inputs(model, image_tokens=96, text_tokens=32, batch=2, dtype=torch.float32)
    query = next(m for n, m in model.named_modules() if n.endswith("to_q"))
    shapes = []
    query.register_forward_hook(lambda m, arguments, y: shapes.append(arguments[0].shape))
    with torch.no_grad():
        y = tree_leaves(model(**inputs))
    assert shapes[0] == (2, 96, 64)
    assert sum(t.numel() for t in y) == 2 * 96 * 64


@pytest.mark.parametrize("name", FAMILIES)
def test_released_width_is_the_class_default(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    config = FAMILIES[name].config(FAMILIES[name].width, 128, 1)
    chosen = {"num_layers", "num_single_layers", "n_layers", "n_refiner_layers", "guidance_embeds"}
    for key in config.keys() - chosen:
        default = parameters[key].default
        assert config[key] == (tuple(default) if isinstance(config[key], tuple) else default), key


def test_parameters_kept_in_float32_on_loading_are_float32():
    model = random_model("WanTransformer3DModel", "tiny")
    assert model.blocks[0].scale_shift_table.dtype == torch.float32
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("QwenImageTransformer2DModl", "Did you mean 'QwenImageTransformer2DModel'?"),
        ("QwenImageTransformer2DModl:tiny", "Did you mean 'QwenImageTransformer2DModel'?"),
        ("SD3Transformer2DModel:block", "Valid: QwenImageTransformer2DModel, WanTransformer3D"),
        ("QwenImageTransformer2DModel:tinny", "Did you mean 'tiny'?"),
        ("./no-such-folder", "no folder or configuration ./no-such-folder."),
        ("mathh:sqrt", "unknown module 'mathh'"),
    ],
)
def test_unknown_names_are_answered_with_the_valid_ones(text, expected):
    with pytest.raises(OmniqError) as info:
        find_model(text)
    assert expected in str(info.value)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"width": 100}, "width 100"),
        ({"width": 32}, "width 32"),
        ({"num_blocks": 0}, "num_blocks 0"),
    ],
)
def test_sizes_that_cannot_be_built(sizes, expected):
    with pytest.raises(OmniqError, match=expected):
        random_model(QWEN, "tiny", **sizes)


@pytest.mark.parametrize(("tokens", "expected"), [(1031, "1 x 1031"), (0, "at least 1")])
def test_image_tokens_that_make_no_image(tokens, expected):
    model = random_model(QWEN, width=64)
    with pytest.raises(OmniqError, match=expected):
        make_inputs(model, image_tokens=tokens, text_tokens=8)


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "omniq_test_module.py").write_text(
        "import torch\n"
        "def by_name(): return torch.nn.Linear(4, 2), {'input': torch.ones(3, 4)}\n"
        "def in_order(): return torch.nn.Linear(4, 2), (torch.ones(3, 4),)\n"
        "def wrong(): return torch.nn.Linear(4, 2)\n"
        "def fails(): return 1 // 0\n"
    )
    (tmp_path / "omniq_test_broken.py").write_text("import omniq_test_missing\n")
    yield "omniq_test_module"
    sys.modules.pop("omniq_test_module", None)


@pytest.mark.parametrize("function", ["by_name", "in_order"])
def test_function_with_keyword_or_positional_inputs(module, function):
    loaded = find_model(f"{module}:{function}")
    assert loaded.model(*loaded.args, **loaded.inputs).shape == (3, 2)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("omniq_test_module:by_nam", "Did you mean 'by_name'?"),
        ("omniq_test_modul:by_name", "Did you mean 'omniq_test_module'?"),
        ("omniq_test_module:wrong", "it returned Linear"),
    ],
)
def test_function_that_cannot_be_used(module, text, expected):
    with pytest.raises(OmniqError) as info:
        find_model(text)
    assert expected in str(info.value)


def test_function_that_raises_shows_its_own_traceback(module):
    with pytest.raises(OmniqError) as info:
        find_model(f"{module}:fails")
    assert isinstance(info.value.__cause__, ZeroDivisionError)
    assert "return 1 // 0" in str(info.value)
    assert "model_function.py" not in str(info.value)


def test_module_that_lacks_an_import_of_its_own(module):
    with pytest.raises(OmniqError, match="No module named 'omniq_test_missing'"):
        find_model("omniq_test_broken:anything")
