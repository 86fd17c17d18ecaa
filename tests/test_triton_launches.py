"""What the Triton GEMMs are launched with."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from omniq_compile import QuantConfig, backend
from omniq_compile.lowering import registry
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import get_scheme
from omniq_compile.lowering.target import Target
from omniq_compile.lowering.triton_kernels import launch, ops

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("K", "dtype", "fits"),
    [(272, BF16, True), (264, BF16, False), (272, FP16, True), (272, FP32, False)],
)
def test_a_launch_has_tma_load_whole_runs_of_16_bytes_beside_a_result_of_16_bits(
    K: int, dtype: torch.dtype, fits: bool
) -> None:
    with torch.device("meta"):
        a, b = (torch.empty(rows, K, dtype=torch.int8) for rows in (4096, 3072))
        out = torch.empty(4096, 3072, dtype=dtype)
    made = launch.row_scaled(
        a, a[:, 0], b, b[:, 0], None, out, fnuz=False, device=launch.Device("sm_90", 132)
    )
    assert [tile.persistent for tile in made.tiles] == [fits]


@pytest.mark.parametrize(("a_columns", "b_columns"), [(128, 96), (64, 128), (96, 64)])
def test_a_step_of_k_has_one_scale_of_each_operand(a_columns: int, b_columns: int) -> None:
    M, N, K = 200, 150, 384
    with torch.device("meta"):
        a, b = (torch.empty(rows, K).to(torch.float8_e4m3fn) for rows in (M, N))
        out = torch.empty(M, N, dtype=BF16)
        scales = (torch.empty(M, K // a_columns), torch.empty(N, K // b_columns))
    device = launch.Device("sm_90", 132)
    made = launch.block_scaled(
        a, scales[0], b, scales[1], None, out, a_columns, 1, b_columns, fnuz=False, device=device
    )
    for tile in made.tiles:
        assert (a_columns % tile.block_k, b_columns % tile.block_k) == (0, 0)


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_no_rows_need_no_launch(leading: tuple[int, ...]) -> None:
    a, b = torch.zeros(*leading, 64, dtype=torch.int8), torch.zeros(3, 64, dtype=torch.int8)
    out = ops.row_scaled_gemm(a, torch.ones(leading), b, torch.ones(3), None, BF16, False)
    assert (out.shape, out.dtype) == ((*leading, 3), BF16)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[launch.Launch]:
    """Keep what would be launched on an A100."""
    kept: list[launch.Launch] = []
    monkeypatch.setattr(launch, "run", kept.append)
    monkeypatch.setattr(launch, "device_of", lambda device: launch.Device("sm_80", 108))
    return kept


def test_a_launch_is_not_traced_for_aot_eager(launches: list[launch.Launch]) -> None:
    """PyTorch runs a traced one on the current device, and with no memory for TMA (torch 2.13,
    `triton_kernel_wrapper_mutation_dense`); in a call of the operator omniq sees to both.
    """
    gemm = torch.ops.omniq.triton_row_scaled_gemm
    gm = torch.fx.symbolic_trace(lambda a, s, b, t: (gemm(a, s, b, t, None, BF16, False),))
    config = QuantConfig.from_options({"method": "int8", "compiler": "aot_eager"})
    with FakeTensorMode(), torch.device("cuda:0"):
        a, b = (torch.empty(rows, 256, dtype=torch.int8) for rows in (4096, 3072))
        operands = [a, torch.empty(4096), b, torch.empty(3072)]
        compiled = backend._compile(gm, operands, config)
        (out,) = compiled(*operands)
    assert (out.shape, out.device.type, launches) == ((4096, 3072), "cuda", [])


@pytest.mark.parametrize("M", [4, 200])
def test_an_activation_that_autocast_would_cast_is_cast(
    launches: list[launch.Launch], M: int
) -> None:
    """It comes in float32, and the weight's codes become the result's dtype, by either way."""
    scheme, problem = get_scheme("fp8"), Problem(M, 384, 64, 2, 2, BF16)
    kernel, _ = registry.choose(scheme, Target.parse("cuda:sm_80"), problem)
    assert kernel is not None
    assert kernel.name == "cuda_fp8_weight_only_triton"
    weight = get_format("fp8").quantize(torch.randn(64, 384))
    kernel.gemm(kernel.quantize(torch.randn(M, 384), "fp8"), weight, None, problem, scheme)
    (launched,) = launches
    assert launched.arguments["a_ptr"].dtype is BF16


def test_the_second_of_two_activations_has_scales_of_its_own_rows(
    launches: list[launch.Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight's block is of many rows, and an activation's group of one."""
    monkeypatch.setattr(launch, "device_of", lambda device: launch.Device("sm_89", 128))
    scheme = get_scheme("fp8", weight_block_size=(96, 128))
    problem = Problem(37, 384, 200, 2, 2, BF16, b_is_weight=False)
    kernel, _ = registry.choose(scheme, Target.parse("cuda:sm_89"), problem)
    assert kernel is not None
    assert kernel.name == "cuda_fp8_block_triton"
    a, b = (kernel.quantize(torch.randn(rows, 384), scheme.activation) for rows in (37, 200))
    kernel.gemm(a, b, None, problem, scheme)
    (launched,) = launches
    scales = launched.arguments["b_scale_ptr"]
    rows, columns = (launched.constants[name] for name in ("B_ROWS", "B_COLUMNS"))
    assert scales.shape == (-(-200 // rows), -(-384 // columns))


@pytest.mark.parametrize("block", [None, (128, 128)])
@pytest.mark.parametrize("place", ["rocm:gfx942", "rocm:gfx950", "rocm:gfx1201", "cuda:sm_89"])
def test_e4m3_is_multiplied_as_fnuz_on_gfx942_alone(
    launches: list[launch.Launch],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    block: tuple[int, int] | None,
) -> None:
    """CDNA 3 has no other e4m3 (AMD Instinct MI300 ISA), and the others have not that one."""
    target, scheme = Target.parse(place), get_scheme("fp8", weight_block_size=block)
    monkeypatch.setattr(launch, "device_of", lambda device: launch.Device(target.arch, 304))
    problem = Problem(37, 384, 200, 2, 2, BF16)
    name = f"{target.device}_fp8{'_block' if block else ''}_triton"
    (kernel,) = (k for k in registry.candidates("fp8", target) if k.name == name)
    assert kernel.refuse(problem, scheme) is None
    x = kernel.quantize(torch.randn(37, 384), scheme.activation)
    weight = get_format(scheme.weight).quantize(torch.randn(200, 384))
    kernel.gemm(x, weight, None, problem, scheme)
    (launched,) = launches
    assert launched.constants["FNUZ"] == (target.arch == "gfx942")
