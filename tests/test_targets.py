"""Targets as data: what a machine is, what it runs, and the table of kernels for those absent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Holder

import omniq_compile as omniq
from omniq_compile.backend import run_target
from omniq_compile.checkpoints.filling import with_target
from omniq_compile.lowering import registry, target
from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import METHODS, get_scheme
from omniq_compile.lowering.target import ARCHITECTURES, Target, detect, present

TARGETS = [Target(device, arch) for device, archs in ARCHITECTURES.items() for arch in archs]
by_target = pytest.mark.parametrize("place", TARGETS, ids=str)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "cuda:sm_80"),
        ((8, 6), "cuda:sm_80"),
        ((8, 9), "cuda:sm_89"),
        ((9, 0), "cuda:sm_90"),
        ((10, 0), "cuda:sm_100"),
        ((10, 3), "cuda:sm_100"),
        ((11, 0), "cuda:sm_89"),
        ((12, 0), "cuda:sm_120"),
        ((12, 1), "cuda:sm_120"),
        ((13, 0), "cuda:sm_89"),
    ],
)
def test_a_capability_names_its_architecture(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert str(detect("cuda")) == expected


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_a_capability_without_kernels_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(OptionError, match=f"{capability[0]}.{capability[1]}.*sm_120.*inductor"):
        detect("cuda")


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("gfx942:sramecc+:xnack-", "gfx942"),
        ("gfx950", "gfx950"),
        ("gfx90a:sramecc+:xnack-", "gfx90a"),
        ("gfx908:sramecc+:xnack-", "gfx90a"),
        ("gfx1100", "gfx1100"),
        ("gfx1151", "gfx1100"),
        ("gfx1200", "gfx1201"),
    ],
)
def test_amd_gpus_are_the_cuda_device_of_a_hip_build(
    monkeypatch: pytest.MonkeyPatch, arch: str, expected: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = SimpleNamespace(gcnArchName=arch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert detect("cuda") == Target("rocm", expected)
    assert Target("rocm", expected).torch_device == "cuda"


@pytest.mark.parametrize("arch", ["gfx1030", "gfx906:sramecc+:xnack-", "gfx1250"])
def test_amd_gpus_with_other_matrix_instructions_or_none_are_refused(
    monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = SimpleNamespace(gcnArchName=arch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    with pytest.raises(OptionError, match=rf"\({arch.partition(':')[0]}\).*gfx950.*inductor"):
        detect("cuda")


def test_gpus_of_one_machine_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is chosen for the GPU that the model is on, and not for the current one."""
    capabilities = {None: (9, 0), 0: (9, 0), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    assert str(detect("cuda")) == str(detect(torch.device("cuda:0"))) == "cuda:sm_90"
    assert str(detect(torch.device("cuda:1"))) == "cuda:sm_80"
    here, there, cpu = map(torch.device, ("cuda:0", "cuda:1", "cpu"))
    config = omniq.QuantConfig("fp8")
    assert str(run_target(config, [there, cpu])) == "cuda:sm_80"
    assert str(run_target(config, [here])) == "cuda:sm_90"
    devices = {"": "cuda:1"}
    assert str(with_target(config, devices).target) == "cuda:sm_80"
    assert with_target(config, devices | {"a": "cuda:0"}).target is None


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("Ascend910B3", "ascend910b"),
        ("Ascend910B4-1", "ascend910b"),
        ("Ascend910_9392", "ascend910b"),
        ("Ascend950PR_9599", "ascend950"),
        ("Ascend950DT_95A1", "ascend950"),
        ("Ascend910B", None),  # of the first generation, unlike those with a digit
        ("Ascend910ProB", None),
        ("Ascend310P3", None),
    ],
)
def test_an_npu_is_told_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, arch: str | None
) -> None:
    npu = SimpleNamespace(get_device_name=lambda _: name, is_available=lambda: True)
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    if arch is None:
        with pytest.raises(OptionError, match=rf"no kernels for this npu device \({name}\)"):
            present("npu")
    else:
        assert present("npu") == Target("npu", arch)


def test_a_bare_device_that_is_absent_asks_for_an_architecture() -> None:
    if present("cuda") is None:
        with pytest.raises(OptionError, match=r"it has none.*cuda:sm_120, cuda:sm_100"):
            Target.parse("cuda")


def test_a_gpu_from_before_those_with_kernels_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"no kernels for sm_75: of NVIDIA's GPUs .* from sm_80"):
        Target.parse("cuda:sm_75")
    with pytest.raises(OptionError, match=r"unknown cuda architecture 'sm_9x'\. Did you mean"):
        Target.parse("cuda:sm_9x")


def test_a_gpu_may_be_named_by_its_own_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is then what a machine that has it is."""
    for named, row in target.ALIKE["cuda"].items():
        assert str(Target.parse(f"cuda:{named}")) == f"cuda:{row}"
        capability = divmod(int(named.removeprefix("sm_")), 10)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert detect("cuda") == Target.parse(f"cuda:{named}")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for named, row in target.ALIKE["rocm"].items():
        assert str(Target.parse(f"rocm:{named}")) == f"rocm:{row}"
        properties = SimpleNamespace(gcnArchName=named)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        assert detect("cuda") == Target.parse(f"rocm:{named}")


def test_only_later_nvidia_gpus_run_what_was_lowered_for_earlier_ones() -> None:
    def runs(here: str, there: str) -> bool:
        return Target.parse(here).runs(Target.parse(there))

    assert runs("cuda:sm_90", "cuda:sm_80")
    assert runs("cuda:sm_90", "cuda:sm_90")
    assert not runs("cuda:sm_80", "cuda:sm_90")
    # Each has instructions that the other lacks.
    assert not runs("cuda:sm_100", "cuda:sm_90")
    assert not runs("rocm:gfx950", "rocm:gfx942")
    assert not runs("cuda:sm_90", "cpu:generic")


def test_what_runs_elsewhere_names_known_targets() -> None:
    for here, archs in target.RUNS.items():
        assert all(Target.parse(here).runs(Target(here.split(":")[0], arch)) for arch in archs)
        assert set(archs) <= set(ARCHITECTURES[here.split(":")[0]])


@by_target
@pytest.mark.parametrize("method", METHODS)
def test_every_cell_has_a_kernel_and_says_what_it_is(place: Target, method: str) -> None:
    rows = [row for row in omniq.kernels() if (row.target, row.method) == (str(place), method)]
    assert [row.preferred for row in rows] == [True] + [False] * (len(rows) - 1)
    assert all(row.about for row in rows)
    assert len({row.kernel for row in rows}) == len(rows)


# Which cells multiply in the method's own precision, at the size of a real layer.
NATIVE = {
    "rocm:gfx950": {"int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale"},
    "rocm:gfx942": {"int8", "fp8"},
    "rocm:gfx1201": {"int8", "fp8"},
    "rocm:gfx1100": {"int8"},
    "rocm:gfx90a": {"int8"},
    "xpu:xe": {"int8", "fp8"},
    "npu:ascend950": {"int8", "mxfp8", "mxfp4", "mxfp4_dualscale"},
    "npu:ascend910b": {"int8"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", NATIVE)
def test_a_cell_is_native_or_says_why_not(place: str, method: str) -> None:
    problem = Problem("s0", 3072, 12288, 3, 2, torch.bfloat16)
    kernel, _ = registry.choose(get_scheme(method), Target.parse(place), problem)
    assert kernel is not None
    assert kernel.native == (method in NATIVE[place])
    for row in registry.candidates(method, Target.parse(place)):
        assert row.native or ": " in row.about
        assert "this path" not in row.about


def test_rows_of_omniqs_own_kernels_name_their_device_code() -> None:
    rows = [row for device in ARCHITECTURES for row in registry.kernels_of(device)]
    named = [row for row in rows if row.source]
    assert {row.name for row in rows if row.name.endswith("_triton")} <= {r.name for r in named}
    for row in named:
        assert ("@triton.jit" in row.read_source()) == row.source.endswith(".py")


def test_kernel_names_are_unique_on_their_target() -> None:
    for place in TARGETS:
        names = [k.name for method in METHODS for k in registry.candidates(method, place)]
        assert len(set(names)) == len(names)


BLOCKS = {"weight_block_size": [128, 128]}
W4A8 = {"w4a8_fallback_layers": ["re:.*"]}


@by_target
@pytest.mark.parametrize(
    ("method", "more"),
    [*((method, {}) for method in METHODS), ("fp8", BLOCKS), ("mxfp4", W4A8)],
)
def test_a_model_is_lowered_for_a_device_that_is_absent(
    place: Target, method: str, more: dict[str, Any]
) -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, w)

    model = Holder(forward, w=torch.randn(384, 320, dtype=torch.bfloat16))
    options: dict[str, Any] = {"method": method} | more
    if method == "mxfp4_dualscale":
        options["num_bf16_fallback_layers"] = 0
    x = torch.randn(2, 33, 320, dtype=torch.bfloat16)
    report = omniq.explain(model, [x], options, target=str(place))
    assert [site.decision.method for site in report.sites] == [method]
    assert report.target == str(place)
    assert report.sites[0].decision.kernel in report.graphs[0].programs["lowered"]


_NATIVE, _EMULATED = True, False
_MX = ("mxfp8", "mxfp4", "mxfp4_dualscale")
CELLS = {
    "cuda:sm_120": {"int8": _NATIVE, "fp8": _NATIVE, "fp8 blocks": _NATIVE}
    | dict.fromkeys(_MX, _NATIVE),
    "cuda:sm_89": {"int8": _NATIVE, "fp8": _NATIVE, "fp8 blocks": _NATIVE}
    | dict.fromkeys(_MX, _EMULATED),
    "cuda:sm_80": {"int8": _NATIVE, "fp8": _EMULATED, "fp8 blocks": _EMULATED}
    | dict.fromkeys(_MX, _EMULATED),
}
CELLS["cuda:sm_100"] = CELLS["rocm:gfx950"] = CELLS["cuda:sm_120"]
CELLS["cuda:sm_90"] = CELLS["rocm:gfx942"] = CELLS["rocm:gfx1201"] = CELLS["cuda:sm_89"]
CELLS["rocm:gfx1100"] = CELLS["rocm:gfx90a"] = CELLS["cuda:sm_80"]


@pytest.mark.parametrize(
    ("place", "method"), [(place, method) for place, row in CELLS.items() for method in row]
)
@pytest.mark.parametrize("M", [1, 4096])
def test_a_gpu_multiplies_in_the_precision_that_it_has(place: str, method: str, M: int) -> None:
    block = (128, 128) if method == "fp8 blocks" else None
    scheme = get_scheme(method.split()[0], weight_block_size=block)
    problem = Problem(M, 3072, 9216, 3, 2, torch.bfloat16)
    kernel, why = registry.choose(scheme, Target.parse(place), problem)
    assert kernel is not None, why
    assert kernel.native is CELLS[place][method], kernel.name


def test_explaining_for_an_absent_device_leaves_running_on_it_an_error() -> None:
    model = Holder(torch.matmul, w=torch.randn(38, 19))
    compiled = torch.compile(
        model, backend="omniq", options={"method": "int8", "target": "npu:ascend950"}
    )
    with pytest.raises(Exception, match=r"'npu:ascend950', and this model is on 'cpu:.*cannot run"):
        compiled(torch.randn(7, 38))
