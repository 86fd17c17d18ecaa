"""Options are checked: what is wrong, what is valid, and what was probably meant."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OPTIONS, Holder
from torch._dynamo.exc import BackendCompilerFailed

from omniq_compile import OptionError, QuantConfig, explain
from omniq_compile.backend import omniq
from omniq_compile.lowering.schemes import get_scheme
from omniq_compile.lowering.target import ARCHITECTURES, Target


def check(**options: Any) -> QuantConfig:
    return QuantConfig.from_options({"method": "int8"} | options)


def test_defaults_are_those_of_the_docs() -> None:
    assert check() == QuantConfig(
        method="int8", ignored_layers=(), activation_scheme="dynamic", min_features=256,
        matmul=False, compiler="inductor", inductor={}, mode="default", target=None,
    )  # fmt: skip


def test_every_option_is_taken() -> None:
    config = check(
        ignored_layers=["img_mod", "re:.*attn"], activation_scheme="dynamic", min_features=1,
        matmul=True, compiler="inductor", inductor={"max_autotune": False}, mode="reduce-overhead",
        target="cpu:generic",
    )  # fmt: skip
    assert config.ignored_layers == ("img_mod", "re:.*attn")
    assert (config.min_features, config.matmul, config.compiler) == (1, True, "inductor")
    assert config.inductor == {"max_autotune": False}
    assert config.mode == "reduce-overhead"
    assert config.target == Target("cpu", "generic")
    assert QuantConfig.from_options(config) is config


@pytest.mark.parametrize(
    "options",
    [
        {"method": "int8", "ignored_layers": ["a.b"], "target": "cuda:sm_90", "matmul": True},
        {"method": "fp8", "weight_block_size": [128, 64], "inductor": {"max_autotune": True}},
        {"method": "mxfp8", "mode": "reduce-overhead", "min_features": 7},
        {"method": "mxfp4", "w4a8_fallback_steps": [3, 0], "mxfp4_scale_alg": 2},
        {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0, "compiler": "eager"},
    ],
    ids=lambda options: str(options["method"]),
)
def test_options_can_be_given_again_and_are_plain(options: dict[str, Any]) -> None:
    config = QuantConfig.from_options(options)
    again = config.to_options()
    assert QuantConfig.from_options(again) == config
    assert QuantConfig.from_options(json.loads(json.dumps(again))) == config
    # None of another method's, which would be refused, and each that the method has.
    assert set(options) <= set(again)


@pytest.mark.parametrize("options", [None, {}, {"min_features": 3}, "int8", ["int8"]])
def test_missing_options_say_how_to_give_them(options: Any) -> None:
    given = "none" if options is None else repr(options)
    with pytest.raises(
        OptionError, match=r'options=\{"method": \.\.\.\}\. Methods: int8'
    ) as caught:
        QuantConfig.from_options(options)
    assert str(caught.value).endswith(f"Given: {given}.")


def test_an_option_is_found_wrong_before_the_missing_method() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'Method'\. Did you mean 'method'\?"):
        QuantConfig.from_options({"Method": "int8"})


def test_steps_may_be_a_range() -> None:
    config = QuantConfig.from_options({"method": "mxfp4", "w4a8_fallback_steps": range(3)})
    assert config.w4a8_fallback_steps == (0, 1, 2)
    options = {"method": "mxfp4", "w4a8_fallback_steps": [2, 0, 1, 0]}
    assert QuantConfig.from_options(options) == config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ignore_layers": []}, ["unknown option 'ignore_layers'", "Did you mean 'ignored_layers'",
                                 "Valid: method, ignored_layers,", "target."]),
        ({"zzz": 1}, ["unknown option 'zzz'. Valid: method,"]),
        ({3: 1}, ["unknown option 3"]),
        ({"max_autotune": True}, ["a setting of Inductor", "{'inductor': {'max_autotune': ...}}"]),
        ({"fullgraph": True}, ["an argument of torch.compile", "fullgraph=..., options=..."]),
        ({"backend": "inductor"}, ["where omniq is given"]),
        ({"weight_block_size": [1, 10**30]}, ["from 1 to 2**31 - 1"]),
        ({"method": "int9"}, ["unknown method 'int9'", "Did you mean 'int8'?", "Valid: int8"]),
        ({"method": ["int8"]}, ["unknown method ['int8']"]),
        ({"method": np.array(["int8", "fp8"])}, ["unknown method array("]),
        ({"mode": torch.ones(2)}, ["unknown mode tensor("]),
        ({"method": "mxfp4", "mxfp4_scale_alg": torch.ones(2)}, ["must be 0", "tensor("]),
        ({"method": "mxfp4", "mxfp4_scale_alg": 2.0}, ["must be 0", "not 2.0"]),
        ({"method": None}, ["unknown method None"]),
        ({"compiler": "indutcor"}, ["unknown compiler 'indutcor'", "Did you mean 'inductor'",
                                    "Valid: inductor, aot_eager, eager."]),
        ({"activation_scheme": "static"}, ["unknown activation_scheme 'static'", "dynamic"]),
        ({"mode": "reduce_overhead"}, ["unknown mode 'reduce_overhead'",
                                       "Did you mean 'reduce-overhead'?", "Valid: default,"]),
        ({"min_features": 0}, ["'min_features'", "at least 1", "not 0"]),
        ({"min_features": True}, ["'min_features'", "not True"]),
        ({"min_features": 3.0}, ["'min_features'", "not 3.0"]),
        ({"matmul": 1}, ["'matmul'", "True or False", "not 1"]),
        ({"ignored_layers": "img_mod"}, ["'ignored_layers'", "a list", "not 'img_mod'"]),
        ({"ignored_layers": [3]}, ["'ignored_layers'", "[3]"]),
        ({"ignored_layers": [""]}, ["'ignored_layers'"]),
        ({"ignored_layers": None}, ["'ignored_layers'", "None"]),
        ({"ignored_layers": ["re:a("]}, ["'re:a('", "not a regular expression"]),
        ({"inductor": "max-autotune"}, ["'inductor'", "a dict", "list_options()"]),
        ({"inductor": {"max_autotun": True}}, ["'inductor'", "'max_autotun'", "list_options()",
                                               "Did you mean 'max_autotune'?"]),
        ({"inductor": {"max_autotune": "yes"}}, ["'max_autotune': 'yes'", "takes a bool"]),
        ({"inductor": {"triton.cudagraphs": None}}, ["'triton.cudagraphs': None", "a bool"]),
        ({"w4a8_fallback_steps": [-1]}, ["zero-based", "not [-1]"]),
        ({"target": "cpu:"}, ["unknown cpu architecture ''", "Valid: "]),
        ({"target": 3}, ["'target'", "not 3"]),
        ({"target": "cpv"}, ["unknown target device 'cpv'", "Did you mean 'cpu'"]),
        ({"target": "cpu:generik"}, ["unknown cpu architecture 'generik'",
                                     "Did you mean 'generic'?", "Valid: "]),
        ({"target": ""}, ["unknown target device ''"]),
    ],
)  # fmt: skip
def test_a_wrong_option_names_the_valid_and_the_nearest(
    options: Mapping[Any, Any], words: list[str]
) -> None:
    with pytest.raises(OptionError) as caught:
        QuantConfig.from_options({"method": "int8"} | dict(options))
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert isinstance(caught.value, ValueError)
    given: dict[Any, Any] = {"method": "int8"} | dict(options)
    if all(name in QuantConfig.__dataclass_fields__ for name in given):
        with pytest.raises(OptionError) as constructed:
            QuantConfig(**given)
        assert str(constructed.value) == message


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("name", "value"), [("mode", "reduce-overhead"), ("inductor", {"max_autotune": True})]
)
def test_what_the_compiler_would_not_read_is_an_error(compiler: str, name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{name!r} is .* 'compiler' is {compiler!r}. Leave out"):
        check(compiler=compiler, **{name: value})
    assert getattr(check(compiler="inductor", **{name: value}), name) == value


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_the_defaults_go_with_every_compiler(compiler: str) -> None:
    assert check(compiler=compiler, mode="default", inductor={}) == check(compiler=compiler)


def test_a_mode_beside_the_options_is_checked_like_one_among_them() -> None:
    model = Holder(torch.matmul, w=torch.randn(38, 19))
    backend = functools.partial(omniq, options=OPTIONS)
    with pytest.raises(BackendCompilerFailed, match=r"'mode' is 'max-autotune'.* Leave out one"):
        torch.compile(model, backend=backend, mode="max-autotune")(torch.randn(7, 38))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("method", "INT8", "int8"),
        ("compiler", "AOT-Eager", "aot_eager"),
        ("activation_scheme", "Dynamic", "dynamic"),
    ],
)
def test_case_and_hyphens_do_not_matter(name: str, value: str, expected: str) -> None:
    assert getattr(check(**{name: value}), name) == expected


def test_integers_of_numpy_are_integers() -> None:
    config = check(min_features=np.int64(7))
    assert (config.min_features, type(config.min_features)) == (7, int)
    block = check(method="fp8", weight_block_size=[np.int32(64), 32]).weight_block_size
    assert block == (64, 32)


@pytest.mark.parametrize("layers", [["a", "b"], ("a", "b")])
def test_ignored_layers_may_be_any_sequence(layers: Any) -> None:
    assert check(ignored_layers=layers).ignored_layers == ("a", "b")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "MXFP4-Dualscale"},
        {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0},
        {"method": "fp8", "weight_block_size": [64, 96], "ignored_layers": ["a"]},
        {"method": "mxfp4", "w4a8_fallback_steps": range(2), "target": "cpu:generic"},
    ],
)
def test_the_constructor_checks_as_a_dict_is_checked(options: dict[str, Any]) -> None:
    config = QuantConfig(**options)
    assert config == QuantConfig.from_options(options)
    assert hash(config) == hash(QuantConfig.from_options(options))
    assert config.scheme == get_scheme(
        config.method, config.mxfp4_scale_alg, config.weight_block_size
    )


@pytest.mark.parametrize(
    ("name", "value", "methods"),
    [
        ("weight_block_size", (128, 128), "fp8"),
        ("mxfp4_scale_alg", 2, "mxfp4 and mxfp4_dualscale"),
        ("num_bf16_fallback_layers", 3, "mxfp4_dualscale"),
        ("w4a8_fallback_layers", ["a"], "mxfp4"),
        ("w4a8_fallback_steps", [0], "mxfp4"),
    ],
)
def test_an_option_of_another_method_is_refused(name: str, value: Any, methods: str) -> None:
    words = f"{name!r} is for method {methods}, not for 'int8'"
    with pytest.raises(OptionError, match=words):
        QuantConfig("int8", **{name: value})
    with pytest.raises(OptionError, match=words):
        check(**{name: value})


@pytest.mark.parametrize("device", sorted(ARCHITECTURES))
def test_every_target_is_read_as_it_is_printed(device: str) -> None:
    for arch in ARCHITECTURES[device]:
        target = Target(device, arch)
        assert Target.parse(str(target)) == target
        assert Target.parse(f" {str(target).upper()} ") == target


@pytest.mark.parametrize(
    ("flags", "arch"),
    [
        ((), "generic"),
        (("avx512_f", "avx512_bf16"), "generic"),
        (("avx512_vnni",), "avx512_vnni"),
        (("avx512_vnni", "avx512_bf16"), "avx512_bf16"),
        (("amx_int8", "amx_bf16"), "avx512_bf16"),
    ],
)
def test_a_bare_device_is_this_machine(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], arch: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True))
    assert str(check(target="cpu").target) == f"cpu:{arch}"


def test_a_target_that_the_model_is_not_on_is_refused() -> None:
    model = Holder(torch.matmul, w=torch.randn(38, 19))
    config = QuantConfig("int8", compiler="eager", target=Target("cuda", "sm_90"))
    with pytest.raises(BackendCompilerFailed, match="'cuda:sm_90', and this model is on 'cpu:"):
        torch.compile(model, backend="omniq", options=config)(torch.randn(7, 38))


def test_the_target_of_explain_wins_over_the_option() -> None:
    model, inputs = Holder(torch.matmul, w=torch.randn(38, 19)), (torch.randn(7, 38),)
    for target in ("cpu:generic", "cpu:avx512_vnni"):
        assert explain(model, inputs, OPTIONS, target=target).target == target
    with pytest.raises(OptionError, match="unknown target device 'tpu'"):
        explain(model, inputs, OPTIONS, target="tpu")
    with pytest.raises(OptionError, match=r"a target must be text such as 'cpu'.*, not 3"):
        explain(model, inputs, OPTIONS, target=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"inputs must be the model's arguments.*, not None"):
        explain(model, None, OPTIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["mxfp4", "mxfp4_dualscale"])
def test_a_scheme_has_the_scale_algorithms_that_its_format_has(method: str) -> None:
    names = [get_scheme(method, scale_alg).weight for scale_alg in (0, 2)]
    assert names == [method, f"{method}_uos"]
    for scale_alg in (1, 7, -2):
        with pytest.raises(OptionError, match=rf"scale_alg {scale_alg}\. Valid: 0 \(OCP\), 2"):
            get_scheme(method, scale_alg)
