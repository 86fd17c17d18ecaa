"""Omniq on a device that is neither the host's nor CUDA's, from loading to pictures.

Run by tests/test_host_npu.py in a process of its own, since a process has one accelerator.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakSet

import device
import gpu_checks as checks
import gpu_kernels
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch._inductor.codegen.common import device_codegens, register_backend_for_device

device.install()

import tiny_families  # noqa: E402  (diffusers looks for torch_npu when it is imported)
from diffusers import DiffusionPipeline, FluxTransformer2DModel  # noqa: E402

import omniq_compile as omniq  # noqa: E402
from omniq_compile.benchmark.measure import run_bench  # noqa: E402
from omniq_compile.benchmark.result import BenchConfig  # noqa: E402
from omniq_compile.benchmark.variants import Variant  # noqa: E402
from omniq_compile.checkpoints.load_arguments import DTYPE_KEYWORD  # noqa: E402
from omniq_compile.cli import main  # noqa: E402
from omniq_compile.compiling import inductor, weight_changes  # noqa: E402
from omniq_compile.compiling.weights import QuantizedWeight  # noqa: E402
from omniq_compile.lowering.errors import OptionError  # noqa: E402
from omniq_compile.lowering.formats import rows  # noqa: E402
from omniq_compile.lowering.schemes import METHODS  # noqa: E402
from omniq_compile.lowering.target import detect  # noqa: E402
from omniq_compile.passes.context import Binding  # noqa: E402

PLACE = checks.Place("npu", compiler="aot_eager", width=64, tokens=(16, 8))
OPTIONS = {"method": "int8", "min_features": 1, "compiler": "aot_eager"}
QWEN, FLUX = "QwenImageTransformer2DModel", "FluxTransformer2DModel"
WAN = "WanTransformer3DModel"
SECOND = ("single_transformer_blocks", "norm_out", "proj_out")
# The quantizer of two levels rounds to BF16 between them: tests/test_npu.py knows how.
KERNELS = [
    kernel
    for kernel in gpu_kernels.kernels_on(detect("npu"))
    if kernel.native and "dual_level" not in kernel.name
]


@pytest.mark.parametrize(
    ("name", "architecture"), [("Ascend910B3", "ascend910b"), ("Ascend950PR", "ascend950")]
)
def test_the_architecture_is_found(
    name: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.npu, "get_device_name", lambda index=None: name)
    assert str(detect("npu")) == f"npu:{architecture}"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_multiplies_a_ragged_shape(kernel: gpu_kernels.Kernel) -> None:
    shape = gpu_kernels.ragged_shape(kernel)
    assert gpu_kernels.check_kernel(kernel, "npu", "eager", [shape]) > 0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_rows(method: str) -> None:
    checks.rows(method, 264, 136, True, PLACE, [(1,), (17,), (2, 9)])


def test_a_whole_model() -> None:
    checks.whole(WAN, "int8", PLACE)


@pytest.mark.parametrize("method", ["int8", "mxfp4_dualscale"])
def test_repeated_blocks(method: str) -> None:
    checks.regional(QWEN, method, PLACE)


def test_stored_weights(tmp_path: Path) -> None:
    checks.stored(QWEN, "mxfp4", PLACE, tmp_path)


def test_changed_weights_are_quantized_anew() -> None:
    checks.changed_weights(PLACE)


def test_steady_calls_ask_no_question_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_changes, "PAUSE_SECONDS", 1e3)
    monkeypatch.setattr(weight_changes, "RECHECK_SECONDS", 1e3)
    _, call = checks.steady_calls(PLACE)
    asked: list[Any] = []
    monkeypatch.setattr(weight_changes.DeviceComparison, "ask", asked.append)
    for _ in range(5):
        call()
    assert not asked


def layers() -> nn.Sequential:
    modules = nn.Linear(256, 384), nn.GELU(), nn.Linear(384, 136)
    return nn.Sequential(*modules).to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("stored", [False, True])
def test_a_model_follows_where_it_is_moved(stored: bool) -> None:
    model, x = layers(), torch.randn(33, 256, dtype=torch.bfloat16)
    expected = model(x)
    if stored:
        omniq.quantize_(model, OPTIONS)
    fast = torch.compile(model, backend="omniq", options=OPTIONS)
    for place in ("npu:1", "cpu", "npu:0"):
        model.to(place)
        y = fast(x.to(place))
        assert y.device == torch.device(place)
        assert 0.001 < checks.relative(y.cpu(), expected) < 0.02


def test_a_model_may_lie_on_two_devices(tmp_path: Path) -> None:
    model, inputs = checks.tiny(FLUX, PLACE)
    model.save_pretrained(tmp_path)
    places = {name: f"npu:{int(name in SECOND)}" for name, _ in model.named_children()}
    config = omniq.DiffusersConfig("int8", min_features=1)
    loaded = FluxTransformer2DModel.from_pretrained(
        tmp_path,
        **{DTYPE_KEYWORD: torch.bfloat16},
        device_map=places,
        quantization_config=config,
    )
    assert {str(p.device) for p in loaded.parameters()} == {"npu:0", "npu:1"}
    loaded.compile_repeated_blocks(backend="omniq", options={**OPTIONS, "compiler": "eager"})
    with torch.inference_mode():
        expected = checks.picture(model(**inputs))
        checks.assert_near(checks.picture(loaded(**inputs)), expected, "int8", least=1e-4)


class Moving(nn.Module):
    """A layer on each of some devices, as one that is split has them."""

    def __init__(self, places: Sequence[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(256, 256, dtype=torch.bfloat16, device=place) for place in places
        )
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.device))
        return x.cpu()


@pytest.mark.parametrize("places", [("npu:0", "npu:1"), ("npu:0", "cpu")])
def test_weights_of_one_graph_on_two_devices_are_both_followed(places: Sequence[str]) -> None:
    model, x = Moving(places), torch.randn(33, 256, dtype=torch.bfloat16)
    fast = torch.compile(model, backend="omniq", options=OPTIONS)
    for layer in (None, *model.layers):
        if layer is not None:
            layer.weight.data *= -2
            layer.weight.data += torch.randn_like(layer.weight) / 16
            time.sleep(2 * weight_changes.PAUSE_SECONDS)
        assert checks.relative(fast(x), model(x)) < 0.02


class Event:
    """Work of one device, which is done when the host has waited for it, and not before."""

    def __init__(self, _: torch.device) -> None:
        self.done = True

    def record(self, stream: Any) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_after_a_pause_each_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of one says nothing of the other's, whichever of them was asked last."""
    monkeypatch.setattr(weight_changes, "new_event", Event)
    monkeypatch.setattr(weight_changes, "_comparisons", WeakSet())  # without earlier tests' own
    weights = [torch.zeros(64, 48, device=place) for place in ("npu:0", "npu:1")]
    comparisons = weight_changes.comparisons_of([weight_changes.Stamp(w) for w in weights])
    for weight in weights:
        weight.data += 1
    time.sleep(2 * weight_changes.PAUSE_SECONDS)
    weight_changes.entered()
    for comparison in comparisons:
        assert comparison.has_changed()
        assert comparison._event.done


def test_another_threads_stream_finds_weights_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out, and sampled, before any other thread has them: no stream waits for another."""
    events: list[str] = []

    class Stream:
        synchronize = staticmethod(lambda: events.append("waited"))

    def arrange(parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        events.append("arranged")
        return [part.clone() for part in parts]

    monkeypatch.setattr(weight_changes, "current_stream", lambda device: Stream)
    weight = torch.randn(64, 48, device="npu")
    expression: Any = SimpleNamespace(module=nn.Identity())
    for stored in (False, True):
        binding = Binding(
            "int8", expression, ("w",), (), ("layer",), (64, 48), weight.dtype, stored, arrange
        )
        made = QuantizedWeight(binding, [omniq.quantize(weight, "int8") if stored else weight])
        assert events == ["arranged", "waited"]
        weight_changes.comparisons_of(made.stamps)
        assert events == ["arranged", "waited", "waited"]
        events.clear()


def test_threads_share_a_model() -> None:
    model, x = layers().to("npu"), torch.randn(33, 256, device="npu", dtype=torch.bfloat16)
    fast = torch.compile(model, backend="omniq", options=OPTIONS)
    with torch.no_grad():
        first = fast(x)

    def call(_: int) -> bool:
        with torch.no_grad():
            return torch.equal(fast(x), first)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40)))


def test_weights_may_be_made_on_a_default_device() -> None:
    torch.set_default_device("npu")
    try:
        model, x = layers(), torch.randn(33, 256, dtype=torch.bfloat16)
        fast = torch.compile(model, backend="omniq", options=OPTIONS)
        assert checks.relative(fast(x), model(x)) < 0.02
        model[0].weight.mul_(-1)
        assert checks.relative(fast(x), model(x)) < 0.02
    finally:
        torch.set_default_device(None)


def test_inductor_without_code_for_the_device_is_refused_in_words() -> None:
    fast = torch.compile(layers().to("npu"), backend="omniq", options={"method": "int8"})
    with pytest.raises(Exception, match=r"generates no code for 'npu' here.*'aot_eager'"):
        fast(torch.randn(33, 256, device="npu", dtype=torch.bfloat16))


def test_torch_npu_registers_its_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so when told: it would not by itself for another backend than Inductor's own."""
    registered: Any = object()
    module: Any = ModuleType("torch_npu.utils._dynamo")
    module.register_inductor_npu = lambda: register_backend_for_device(
        "npu", registered, registered
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    inductor._refuse_devices_without_code([torch.empty(1, device="npu")])
    assert device_codegens.pop("npu").scheduling is registered


def test_a_capture_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    second = torch.device("npu", 1)
    assert not weight_changes.is_capturing(second)  # a device without graphs
    monkeypatch.setattr(
        torch.npu,
        "is_current_stream_capturing",
        lambda: torch.npu.current_device() == 1,
        raising=False,
    )
    assert weight_changes.is_capturing(second)
    assert not weight_changes.is_capturing(torch.device("npu", 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.save_flux(tmp_path_factory.mktemp("pipeline") / "flux")


def drawn(pipe: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        made = pipe("a red fox", **size, generator=generator, output_type="np")
    return np.asarray(made.images[0])


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    """The picture in BF16, drawn by the host."""
    return drawn(DiffusionPipeline.from_pretrained(folder, **{DTYPE_KEYWORD: torch.bfloat16}))


def assert_looks_like(actual: np.ndarray, expected: np.ndarray) -> None:
    assert 0 < np.sqrt(np.mean((actual - expected) ** 2)) < 0.01


def test_a_pipeline_is_loaded_where_its_device_map_says(folder: Path, expected: np.ndarray) -> None:
    both = {"transformer": OPTIONS, "text_encoder_2": OPTIONS}
    pipe = omniq.from_pretrained(folder, quantization=both, device_map="npu")
    assert {pipe.transformer.device.type, pipe.text_encoder_2.device.type} == {"npu"}
    assert_looks_like(drawn(pipe), expected)
    with pytest.raises(OptionError, match="device_map 'balanced' is no device here"):
        omniq.from_pretrained(folder, quantization=both, device_map="balanced")


def test_a_load_takes_the_quantized_bytes_of_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ACCELERATOR_CHUNK_ELEMENTS", 1 << 12)
    npu: Any = torch.npu  # type: ignore[attr-defined]
    before = npu.memory_allocated()
    npu.reset_peak_memory_stats()
    model = omniq.load_model(folder / "transformer", options=OPTIONS, device="npu")
    largest = max(2 * p.numel() for p in model.parameters())
    held = npu.memory_allocated() - before
    assert held < 0.6 * sum(2 * p.numel() for p in model.parameters())
    assert npu.max_memory_allocated() - before < 1.1 * held + largest


OFFLOADING: dict[str, Callable[[Any], None]] = {
    "by component": lambda pipe: pipe.enable_model_cpu_offload(device="npu"),
    "by block": lambda pipe: pipe.enable_group_offload(
        onload_device=torch.device("npu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    ),
}


@pytest.mark.parametrize(
    ("how", "stored"), [("by component", False), ("by component", True), ("by block", False)]
)
def test_an_offloaded_pipeline_draws_the_same(
    folder: Path, expected: np.ndarray, how: str, stored: bool
) -> None:
    options = {**OPTIONS, "compiler": "eager"}
    if stored:
        pipe = omniq.from_pretrained(folder, quantization=options)
    else:
        pipe = DiffusionPipeline.from_pretrained(folder, **{DTYPE_KEYWORD: torch.bfloat16})
    omniq.compile(pipe.transformer, options)
    OFFLOADING[how](pipe)
    first = drawn(pipe)
    assert_looks_like(first, expected)
    assert np.array_equal(drawn(pipe), first)


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--prompt", "a red fox", "--steps", "1", "--argument", "height=32", "width=32"]
    here = [*size, "--device", "npu"]
    options = '{"method": "int8", "min_features": 1}'
    assert not main(["quantize", str(folder), "--quantization", options, "--out", f"{tmp_path}/q"])
    drawing = ["generate", f"{tmp_path}/q", *here, "--out", f"{tmp_path}/picture.png"]
    assert not main([*drawing, "--compiler", "eager"])
    assert (tmp_path / "picture.png").stat().st_size
    capsys.readouterr()
    torch.compiler.reset()
    assert main(drawing) == 2  # Inductor
    assert "--compiler aot_eager" in capsys.readouterr().err


def test_a_benchmark_asks_the_device_for_its_name_time_and_memory() -> None:
    def build(model: nn.Module, inputs: Any) -> Any:
        return torch.compile(model, backend="omniq", options=OPTIONS)

    config = BenchConfig(
        width=64, image_tokens=16, text_tokens=8, rounds=2, device="npu", torchao=False
    )
    result = run_bench(config, Console(file=io.StringIO()), [Variant("omniq int8", build, OPTIONS)])
    (measured,) = result.measurements
    assert measured.error is None
    assert result.environment["device"] == "Ascend950PR"
    assert result.environment["calls_before_timing"] == 5
    # By the events of device.cpp a timing takes a millisecond, of ten calls.
    assert measured.seconds == [1e-4, 1e-4]
    assert all(seconds > 0 for seconds in measured.host_seconds)
    y_bytes = 16 * 64 * 2
    assert y_bytes < measured.peak_call_bytes < 1e8
