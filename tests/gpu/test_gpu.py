"""The CUDA path on real hardware: every method, model family, GEMM kernel and way of compiling."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gpu_checks as checks
import gpu_kernels
import pytest
import torch

from omniq_compile.compiling import weight_changes
from omniq_compile.lowering.target import detect
from omniq_compile.lowering.triton_kernels import tiles

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this machine has no CUDA or ROCm device"
)

PLACE = checks.Place("cuda")
GRAPHS = {"mode": "reduce-overhead"}
ROWS = [
    (method, K, N, dynamic)
    for method in checks.METHODS
    for K, N in checks.LAYERS
    for dynamic in (None, True)
]
HERE = detect("cuda") if torch.cuda.is_available() else None
KERNELS = gpu_kernels.kernels_on(HERE) if HERE else []
INT8_TILES = tiles.candidates("row_scaled", HERE.arch, 4096, 3072, 132) if HERE else ()


def of_all(names: str, rows: list[Any], *smoke: Any) -> pytest.MarkDecorator:
    """Parametrize with all rows, and mark those that the short run has too."""
    assert set(smoke) <= set(rows)
    short = pytest.mark.gpu_smoke
    params = [pytest.param(*row, marks=short if row in smoke else ()) for row in rows]
    return pytest.mark.parametrize(names, params)


def of_all_models(family: str, method: str) -> pytest.MarkDecorator:
    rows = list(itertools.product(checks.FAMILY_NAMES, checks.METHODS))
    return of_all("family, method", rows, (family, method))


with_graphs = pytest.mark.parametrize("more", [{}, GRAPHS], ids=["eager launch", "CUDA graphs"])
by_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


@pytest.mark.gpu_smoke
@by_kernel
def test_a_kernel_multiplies_a_ragged_shape(kernel: gpu_kernels.Kernel) -> None:
    shapes = [gpu_kernels.ragged_shape(kernel), gpu_kernels.ONE_ROW]
    assert gpu_kernels.check_kernel(kernel, "cuda", "inductor", shapes) > 0


@by_kernel
def test_a_kernel_multiplies_as_the_reference_does(kernel: gpu_kernels.Kernel) -> None:
    assert gpu_kernels.check_kernel(kernel, "cuda", "inductor") > 0


@pytest.mark.parametrize("tile", INT8_TILES, ids=str)
def test_each_tile_that_inductor_may_time_is_exact(
    tile: tiles.Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_kernels.check_int8_tile(tile, "cuda", monkeypatch)


@pytest.mark.parametrize("tile", {t.persistent: t for t in INT8_TILES}.values(), ids=str)
def test_a_result_may_be_larger_than_32_bits_count(
    tile: tiles.Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_kernels.check_large_result(tile, "cuda", monkeypatch)


def test_tiles_are_timed() -> None:
    checks.whole(checks.FAMILY_NAMES[0], "int8", PLACE, mode="max-autotune-no-cudagraphs")


@of_all_models("QwenImageTransformer2DModel", "int8")
@with_graphs
def test_a_whole_model_stays_near_bf16(family: str, method: str, more: dict[str, str]) -> None:
    checks.whole(family, method, PLACE, **more)


@of_all_models("FluxTransformer2DModel", "fp8")
@with_graphs
def test_repeated_blocks_stay_near_bf16(family: str, method: str, more: dict[str, str]) -> None:
    checks.regional(family, method, PLACE, **more)


@of_all_models("WanTransformer3DModel", "mxfp8")
def test_a_new_resolution_gets_its_own_answer(family: str, method: str) -> None:
    checks.resolutions(family, method, PLACE)


@of_all("method, K, N, dynamic", ROWS, ("int8", 257, 131, True), ("fp8", 264, 136, None))
def test_any_number_of_rows(method: str, K: int, N: int, dynamic: bool | None) -> None:
    checks.rows(method, K, N, dynamic, PLACE)


@pytest.mark.gpu_smoke
def test_a_large_result_of_changing_rows() -> None:
    """More tiles than SMs: on sm_90 they are loaded by TMA, in one program an SM."""
    checks.rows("int8", 512, 3072, True, PLACE, [(1500,), (1777,), (2048,)])


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("method", sorted(checks.METHODS))
def test_the_channels_of_one_picture(method: str) -> None:
    checks.channels(method, PLACE)


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("method", ["int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale"])
def test_weights_alone_stay_near_bf16(method: str) -> None:
    checks.whole(checks.FAMILY_NAMES[0], method, PLACE, activation_scheme="none")


@of_all_models("ZImageTransformer2DModel", "mxfp4")
def test_stored_weights(family: str, method: str, tmp_path: Path) -> None:
    checks.stored(family, method, PLACE, tmp_path)


@pytest.mark.gpu_smoke
@with_graphs
def test_changed_weights_are_quantized_anew(more: dict[str, str]) -> None:
    checks.changed_weights(PLACE, **more)


@pytest.mark.gpu_smoke
def test_steady_calls_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises where the host waits for a stream or copies from it, and not for an event."""
    _, call = checks.steady_calls(PLACE)
    torch.cuda.synchronize()
    with torch.no_grad():
        call()  # the first after a pause, which may wait
        monkeypatch.setattr(weight_changes, "PAUSE_SECONDS", 60.0)
        monkeypatch.delattr(weight_changes.DeviceComparison, "_ask_with_others")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu_smoke
def test_a_caller_may_capture_a_call() -> None:
    _, call = checks.steady_calls(PLACE)
    with torch.no_grad():
        expected = call().clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu_smoke
def test_cuda_graphs_do_not_copy_weights() -> None:
    """A replay of blocks with 32 MB of weights may need no second 32 MB."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(2)))
    model = model.requires_grad_(False).to("cuda", torch.bfloat16)
    fast = torch.compile(model, backend="omniq", options=PLACE.options("int8", **GRAPHS))
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        fast(x)
        held = torch.cuda.memory_allocated()
        for _ in range(3):
            fast(x)
    assert torch.cuda.memory_allocated() - held < 16 << 20
