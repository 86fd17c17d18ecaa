"""`quantize_`: which layers, their memory, and what compiled and eager calls then give."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import format_oracle as oracle
import numpy as np
import pytest
import torch
from conftest import OPTIONS, error
from torch import nn

import omniq_compile as omniq
from omniq_compile import OptionError, QuantizedTensor, WeightError
from omniq_compile.compiling.weights import statistics

METHODS = ("int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale")


class Block(nn.Module):
    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.out = nn.Linear(96, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def make(dtype: torch.dtype = torch.bfloat16, blocks: int = 3) -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    return Model(blocks).to(dtype).requires_grad_(False), torch.randn(2, 7, 96, dtype=dtype)


def options(method: str, **more: Any) -> dict[str, Any]:
    leading = {"num_bf16_fallback_layers": 1} if method == "mxfp4_dualscale" else {}
    return OPTIONS | {"method": method} | leading | more


def compiled(model: nn.Module, given: dict[str, Any]) -> Any:
    return torch.compile(model, backend="omniq", options=given)


@pytest.mark.parametrize(
    ("method", "compiler"),
    [*((method, "eager") for method in METHODS), ("int8", "inductor"), ("mxfp4", "inductor")],
)
def test_a_quantized_model_compiles_to_the_numbers_of_the_plain_one(
    method: str, compiler: str
) -> None:
    # All that Inductor may fuse between blocks is there with two, and a third takes as long again.
    model, x = make(blocks=2 if compiler == "inductor" else 3)
    given = options(method, compiler=compiler)
    with torch.no_grad():
        plain = model(x)
        online = compiled(model, given)(x)
        torch._dynamo.reset()
        omniq.quantize_(model, given)
        quantized = statistics()["quantized"]
        assert torch.equal(compiled(model, given)(x), online)
        assert error(model(x), plain) < 0.2
        # Weights come as they are: nothing is quantized at the call.
        new = statistics()["quantized"] - quantized
        assert new == 0 if method != "mxfp4_dualscale" else new <= 2


def test_bytes_are_the_parts_and_old_weights_are_freed() -> None:
    model, _ = make()
    old = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
    rows = omniq.quantize_(model, options("int8"))
    gc.collect()
    assert [ref() for ref in old] == [None] * 7
    assert [row.layer for row in rows[:3]] == ["blocks.0.up", "blocks.0.down", "blocks.1.up"]
    for row in rows:
        weight = model.get_submodule(row.layer).weight
        assert isinstance(weight, QuantizedTensor)
        N, K = row.shape
        assert (row.nbytes_before, row.nbytes_after) == (2 * N * K, weight.nbytes)


def test_every_option_of_the_policy(caplog: pytest.LogCaptureFixture) -> None:
    model, x = make()
    given = options("mxfp4_dualscale", min_features=50, ignored_layers=["blocks.2.up", "upp"])
    with caplog.at_level(logging.INFO, "omniq"):
        rows = omniq.quantize_(model, given)
    reasons = {row.layer: row.reason for row in rows if row.method is None}
    assert reasons == {
        "blocks.0.up": "in one of the 1 leading blocks, which stay BF16",
        "blocks.0.down": "in one of the 1 leading blocks, which stay BF16",
        "blocks.2.up": "ignored by 'blocks.2.up'",
        "out": "N = 40 is under min_features = 50",
    }
    assert type(model.blocks[0].up.weight) is nn.Parameter
    assert "'upp' matches no layer" in caplog.text
    assert "3 linear layers to mxfp4_dualscale, 4 kept" in caplog.text
    with caplog.at_level(logging.INFO, "omniq"):
        omniq.quantize_(model, given)
    assert "0 linear layers to mxfp4_dualscale, 3 quantized already, 4 kept" in caplog.text
    with torch.no_grad():
        report = omniq.explain(model, [x], given)
    assert {s.layer for s in report.kept} == set(reasons)


def test_what_became_of_the_layers_is_printed_as_a_table() -> None:
    model = nn.Sequential(nn.Linear(300, 320), nn.Linear(320, 88)).to(torch.bfloat16)
    plans = omniq.quantize_(model, {"method": "int8"})
    assert repr(plans) == "<1 linear layers to int8, 1 kept; weights 0.2 -> 0.2 MB>"
    assert [" ".join(line.split()) for line in str(plans).splitlines()] == [
        "layer N x K dtype decision bytes before after reason",
        "0 320 x 300 bfloat16 int8 192,000 97,280 quantized to int8",
        "1 88 x 320 bfloat16 kept 56,320 56,320 N = 88 is under min_features = 256",
    ]
    narrow = omniq.quantize_(nn.Sequential(nn.Linear(8, 8)), {"method": "int8"})
    assert (
        repr(narrow) == "<1 linear layers, none quantized: 1 x K = 8 is under min_features = 256>"
    )


def test_layers_that_share_a_weight() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("a", "b", "c", "d")})
    model["embedding"] = nn.Embedding(64, 64)
    model["b"].weight = model["a"].weight
    model["d"].weight = model["embedding"].weight
    rows = omniq.quantize_(model, options("int8"))
    assert model["a"].weight is model["b"].weight
    assert isinstance(model["a"].weight, QuantizedTensor)
    reasons = {row.layer: row.reason for row in rows if row.method is None}
    assert reasons == {"d": "Embedding 'embedding' uses its weight too"}

    rows = omniq.quantize_(nn.ModuleList(_tied()), options("int8", ignored_layers=["1"]))
    assert [row.reason for row in rows] == [
        "it shares its weight with '1', which is kept", "ignored by '1'",
    ]  # fmt: skip


def _tied() -> list[nn.Linear]:
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    return [first, second]


def test_float32_layers_beside_bfloat16_ones_and_other_dtypes() -> None:
    model = nn.ModuleList([nn.Linear(64, 64, dtype=torch.bfloat16), nn.Linear(64, 64)])
    model.append(nn.Linear(64, 64, dtype=torch.float64))
    rows = omniq.quantize_(model, options("fp8"))
    assert [row.method for row in rows] == ["fp8", None, None]
    assert "kept in float32" in rows[1].reason
    assert "float64" in rows[2].reason


def test_twice_is_once() -> None:
    model, _ = make()
    omniq.quantize_(model, options("int8"))
    parts = model.out.weight.codes
    rows = omniq.quantize_(model, options("int8"))
    assert {row.reason for row in rows} == {"quantized already, as int8"}
    assert model.out.weight.codes is parts
    with pytest.raises(omniq.OptionError, match="is quantized already, as int8, and these options"):
        omniq.quantize_(model, options("fp8"))
    # What is kept on purpose may be in another format.
    rows = omniq.quantize_(model, options("fp8", ignored_layers=["*"]))
    assert not any(row.method for row in rows)


def test_a_layer_that_an_adapter_wraps_keeps_its_name() -> None:
    model, _ = make()
    omniq.quantize_(model, options("int8"))
    model.up = nn.ModuleDict({"base_layer": model.out})  # as peft does, and in a second place
    with pytest.raises(omniq.OptionError, match=r"weight of 'blocks\.0\.up' is quantized already"):
        omniq.quantize_(model, options("fp8", ignored_layers=["re:up"]))
    del model.blocks
    for pattern in ("out", "re:up"):
        (row,) = omniq.quantize_(model, options("fp8", ignored_layers=[pattern]))
        assert row.reason == f"ignored by {pattern!r}"
    model.out = None
    with pytest.raises(omniq.OptionError, match=r"the weight of 'up' .*'ignored_layers': \['up'\]"):
        omniq.quantize_(model, options("fp8"))
    model.up["base_layer"] = nn.Linear(64, 64)
    model.up["base_layer"].weight.data[3, 4] = float("nan")
    with pytest.raises(WeightError, match=r"layer 'up': .*'ignored_layers': \['up'\]"):
        omniq.quantize_(model, options("fp8"))


def test_a_weight_with_nan_names_its_layer() -> None:
    model, _ = make()
    model.blocks[1].down.weight[3, 4] = float("nan")
    with pytest.raises(WeightError, match=r"layer 'blocks\.1\.down'.*NaN or Inf.*ignored_layers"):
        omniq.quantize_(model, options("mxfp8"))


def test_a_model_without_blocks_and_a_policy_that_needs_them() -> None:
    with pytest.raises(OptionError, match="Linear has no repeated blocks"):
        omniq.quantize_(nn.Linear(64, 64), {"method": "mxfp4_dualscale"})


@pytest.mark.parametrize(
    ("quantized", "asked"),
    [("int8", {"method": "fp8"}), ("mxfp4", {"method": "mxfp4", "mxfp4_scale_alg": 2})],
)
def test_compiling_for_another_format_is_an_error(quantized: str, asked: dict[str, Any]) -> None:
    model, x = make()
    omniq.quantize_(model, options(quantized))
    with torch.no_grad(), pytest.raises(Exception, match=r"'blocks.0.up' is quantized already, as"):
        compiled(model, OPTIONS | asked)(x)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_an_ignored_layer_of_a_quantized_model_is_decoded(compiler: str) -> None:
    model, x = make(torch.float32)
    omniq.quantize_(model, options("int8"))
    given = options("int8", ignored_layers=["*"], compiler=compiler)
    with torch.no_grad():
        assert error(compiled(model, given)(x), model(x)) < 1e-6


@pytest.mark.parametrize("regional", [False, True])
def test_a_change_of_a_quantized_weight_is_seen(regional: bool) -> None:
    model, x = make()
    given = options("int8")
    omniq.quantize_(model, given)
    call = omniq.compile(model, given) if regional else compiled(model, given)
    with torch.no_grad():
        first = call(x)
        model.out.weight.mul_(2)
        model.blocks[1].up.load_state_dict(nn.Linear(96, 192).state_dict())
        second = call(x)
        expected = model(x)
        assert error(second, first) > 0.5
        assert error(second, expected) < 0.02


@pytest.mark.parametrize("stacked", [torch.cat, torch.stack])
def test_a_weight_made_of_quantized_parameters(stacked: Any) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ stacked([self.q.weight, self.k.weight]).transpose(-1, -2)

    model, x = Fused().requires_grad_(False), torch.randn(2, 5, 64)
    with torch.no_grad():
        plain = model(x)
        omniq.quantize_(model, options("int8"))
        call = compiled(model, options("int8"))
        assert error(call(x), plain) < 0.02
        made = statistics()["quantized"]
        call(x)
        assert statistics()["quantized"] == made
        model.q.weight.mul_(3)
        assert error(call(x), model(x)) < 0.02


def test_quantized_on_the_meta_device_as_a_plan() -> None:
    with torch.device("meta"):
        model = Model()
    rows = omniq.quantize_(model, options("mxfp4"))
    assert {row.method for row in rows} == {"mxfp4"}
    assert model.out.weight.nbytes == rows[-1].nbytes_after == 40 * 48 + 40 * 3


def test_leading_blocks_are_told_from_others_whose_number_begins_like_theirs() -> None:
    with torch.device("meta"):
        model = Model(12)
    rows = omniq.quantize_(model, options("mxfp4_dualscale", num_bf16_fallback_layers=2))
    kept = [row.layer for row in rows if row.method is None]
    assert kept == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]


def test_a_layer_that_no_kernel_takes_is_kept() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(133_145, 40), nn.Linear(40, 133_145))
    rows = omniq.quantize_(model, options("int8", target="cpu:generic"))
    assert [row.method for row in rows] == [None, "int8"]
    assert "can overflow an int32 sum" in rows[0].reason


def test_the_state_of_a_model_survives_safetensors(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model, x = make()
    omniq.quantize_(model, options("mxfp8"))
    tensors, metadata = omniq.flatten_state(model.state_dict())
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    state = omniq.unflatten_state(load_file(tmp_path / "model.safetensors"), metadata)
    with torch.device("meta"):
        other = Model().to(torch.bfloat16).requires_grad_(False)
    other.load_state_dict(state, assign=True)
    with torch.no_grad():
        assert oracle.same_bits(other(x), model(x))


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (None, "not NoneType"),
        (np.ones((4, 4), np.float32), "not ndarray"),
        (torch.eye(4).to_sparse(), "a weight is dense"),
        (omniq.quantize(torch.eye(4), "int8"), "quantized already, to int8"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(weight: Any, words: str) -> None:
    with pytest.raises(omniq.WeightError, match=words):
        omniq.quantize(weight, "mxfp4")


ADVICE = ". To quantize some, give "


@pytest.mark.parametrize(
    ("options", "dtype", "advice"),
    [
        ({}, torch.float32, "a smaller 'min_features'"),
        (
            {"min_features": 1, "ignored_layers": ["re:.*"]},
            None,
            "fewer patterns in 'ignored_layers'",
        ),
        (
            {"ignored_layers": ["re:.*up"]},
            None,
            "a smaller 'min_features' or fewer patterns in 'ignored_layers'",
        ),
        (
            {"method": "mxfp4_dualscale", "min_features": 41, "num_bf16_fallback_layers": 3},
            None,
            "a smaller 'min_features' or a smaller 'num_bf16_fallback_layers'",
        ),
        # By no option: nothing that could be given would quantize any.
        ({"min_features": 1}, torch.float8_e4m3fn, ""),
        ({}, torch.float8_e4m3fn, ""),
    ],
)
def test_what_to_change_is_said_where_it_is_an_option(
    options: dict[str, Any],
    dtype: torch.dtype | None,
    advice: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model().to(dtype or torch.float32).requires_grad_(False)
    rows = omniq.quantize_(model, {"method": "int8"} | options)
    assert all(row.method is None for row in rows)
    (text,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert text.startswith(
        "quantize_: nothing was quantized: all 7 linear layers of Model are kept"
    )
    assert text.partition(ADVICE)[2] == advice
    assert text.endswith(advice or ")")
