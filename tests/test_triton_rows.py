"""Which problems the Triton GEMMs take, in which order, and what a graph that calls them holds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from conftest import Holder
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import omniq_compile as omniq
from omniq_compile.lowering import registry
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import METHODS, Scheme, get_scheme, w4a8
from omniq_compile.lowering.target import RUNS, Target
from omniq_compile.lowering.triton_kernels import launch, tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP8, MXFP4 = get_scheme("int8"), get_scheme("fp8"), get_scheme("mxfp4")
DUALSCALE = get_scheme("mxfp4_dualscale")


def blocks(rows: int, columns: int) -> Scheme:
    return get_scheme("fp8", weight_block_size=(rows, columns))


def chosen(place: str, scheme: Scheme, problem: Problem) -> tuple[str, str]:
    kernel, why = registry.choose(scheme, Target.parse(place), problem)
    assert kernel is not None
    return kernel.name, why


def layer(
    M: Any = 4096, K: int = 3072, N: int = 9216, dtype: torch.dtype = BF16, b_rank: int = 2
) -> Problem:
    return Problem(M, K, N, 3, b_rank, dtype)


@pytest.mark.parametrize(
    ("place", "scheme", "problem", "name", "said"),
    [
        ("cuda:sm_90", INT8, layer(), "cuda_s8_triton", ""),
        ("cuda:sm_80", INT8, layer("s0", 70, 45), "cuda_s8_triton", ""),
        ("cuda:sm_100", INT8, layer(), "cuda_s8_int_mm", ""),
        ("cuda:sm_100", INT8, layer("s0"), "cuda_s8_int_mm", ""),
        ("cuda:sm_100", INT8, layer(1), "cuda_s8_triton", "needs more than 16"),
        ("cuda:sm_100", INT8, layer(64, 70), "cuda_s8_triton", "K = 70"),
        ("cuda:sm_90", INT8, layer(b_rank=3), "cuda_s8_float32", "no batch of matrices"),
        ("cuda:sm_90", FP8, layer(), "cuda_fp8_scaled_mm", "9216 tiles of 64 x 64"),
        ("cuda:sm_90", FP8, layer("s0"), "cuda_fp8_scaled_mm", "not both known"),
        ("cuda:sm_90", FP8, layer(128, N=4224), "cuda_fp8_few_tiles_triton", ""),
        ("cuda:sm_90", FP8, layer(128, N=4240), "cuda_fp8_scaled_mm", "134 tiles of 64 x 64"),
        ("cuda:sm_90", FP8, layer(1, N=18432), "cuda_fp8_few_tiles_triton", ""),
        ("cuda:sm_90", FP8, layer(2, N=18432), "cuda_fp8_scaled_mm", "288 tiles of 64 x 64"),
        ("cuda:sm_90", FP8, layer(K=3000), "cuda_fp8_triton", "not a multiple of 16"),
        ("cuda:sm_90", FP8, layer(dtype=FP16), "cuda_fp8_triton", "result is float16"),
        ("cuda:sm_90", blocks(128, 128), layer(), "cuda_fp8_block_scaled_mm", "one per block"),
        ("cuda:sm_90", blocks(128, 128), layer(7), "cuda_fp8_block_triton", "M = 7 is not"),
        ("cuda:sm_90", blocks(128, 128), layer("s0"), "cuda_fp8_block_triton", "M = s0 is not"),
        ("cuda:sm_90", blocks(128, 128), layer(N=160), "cuda_fp8_block_triton", "N = 160 is not"),
        ("cuda:sm_90", blocks(128, 128), layer(K=3200), "cuda_fp8_block_triton", "K = 3200 is"),
        ("cuda:sm_89", blocks(128, 128), layer(), "cuda_fp8_block_triton", "one per block"),
        ("cuda:sm_90", blocks(7, 96), layer(), "cuda_fp8_block_triton", "one per block"),
        ("cuda:sm_90", blocks(64, 48), layer(), "cuda_fp8_float32", "16 columns share both"),
        ("cuda:sm_80", FP8, layer(), "cuda_fp8_weight_only_triton", ""),
        ("cuda:sm_80", blocks(9, 96), layer(), "cuda_fp8_weight_only_triton", ""),
        ("cuda:sm_80", blocks(9, 48), layer(), "cuda_fp8_float32", "scale per 48 columns"),
        ("cuda:sm_80", FP8, layer(dtype=FP32), "cuda_fp8_float32", "float32 has no fast GEMM"),
        ("cuda:sm_100", MXFP4, layer("s0"), "cuda_mxfp4_triton", ""),
        ("cuda:sm_100", w4a8(MXFP4), layer(), "cuda_mxfp4_triton", ""),
        ("cuda:sm_120", w4a8(MXFP4), layer(1), "cuda_mxfp4_decoded_triton", "mxfp8 by mxfp4 in"),
        ("cuda:sm_120", w4a8(MXFP4), layer(), "cuda_mxfp4_bfloat16", "one tile of 128 rows"),
        ("cuda:sm_89", MXFP4, layer(128), "cuda_mxfp4_decoded_triton", ""),
        ("cuda:sm_89", MXFP4, layer(129), "cuda_mxfp4_bfloat16", "decodes the weight again"),
        ("cuda:sm_90", MXFP4, layer(64), "cuda_mxfp4_decoded_triton", ""),
        ("cuda:sm_90", MXFP4, layer(65), "cuda_mxfp4_bfloat16", "decodes the weight again"),
        ("cuda:sm_90", MXFP4, layer("s0"), "cuda_mxfp4_bfloat16", "M = s0"),
        ("cuda:sm_90", MXFP4, layer(dtype=FP16), "cuda_mxfp4_decoded_triton", ""),
        ("cuda:sm_90", DUALSCALE, layer("s0"), "cuda_mxfp4_dualscale_decoded_triton", ""),
        ("rocm:gfx90a", FP8, layer(), "rocm_fp8_weight_only_triton", ""),
        ("rocm:gfx1100", FP8, layer(), "rocm_fp8_weight_only_triton", ""),
        ("rocm:gfx942", DUALSCALE, layer(), "rocm_mxfp4_dualscale_decoded_triton", ""),
        ("rocm:gfx942", MXFP4, layer(7), "rocm_mxfp4_decoded_triton", ""),
        ("rocm:gfx942", INT8, layer("s0", 70, 45), "rocm_s8_triton", ""),
    ],
)
def test_a_problem_goes_to_the_first_kernel_that_takes_it(
    place: str, scheme: Scheme, problem: Problem, name: str, said: str
) -> None:
    found, why = chosen(place, scheme, problem)
    assert found == name
    assert said in why
    assert bool(said) == bool(why)


@pytest.mark.parametrize("place", ["cuda:sm_100", "cuda:sm_120", "cuda:sm_89", "rocm:gfx942"])
@pytest.mark.parametrize("M", [64, 4096])
def test_blocks_of_32_are_not_cut_from_a_symbolic_k(place: str, M: int) -> None:
    for method in ("mxfp8", "mxfp4", "mxfp4_dualscale"):
        problem = Problem(M, "s0", 9216, 3, 2, BF16)  # type: ignore[arg-type]
        kernel, why = registry.choose(get_scheme(method), Target.parse(place), problem)
        assert kernel is None
        assert f"K is symbolic (s0), and {method} cuts" in why


def test_two_activations_are_not_decoded_as_a_weight() -> None:
    problem = Problem(9, 64, 64, 2, 2, BF16, b_is_weight=False)
    assert chosen("cuda:sm_90", MXFP4, problem)[0] == "cuda_mxfp4_bfloat16"
    assert chosen("cuda:sm_120", w4a8(MXFP4), problem)[0] == "cuda_mxfp4_triton"


def test_no_row_calls_dot_scaled_where_triton_has_it_not() -> None:
    """Before sm_100 and gfx950 there is no instruction, and for gfx942 Triton fails to compile."""
    for place in ("cuda:sm_80", "cuda:sm_89", "cuda:sm_90", "rocm:gfx942"):
        target = Target.parse(place)
        for method in ("mxfp8", "mxfp4", "mxfp4_dualscale"):
            assert not any(kernel.native for kernel in registry.candidates(method, target))


def lowered(place: str, method: str, M: int) -> str:
    def forward(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, w, b)

    w, b = torch.randn(384, 320, dtype=BF16), torch.randn(384, dtype=BF16)
    options: dict[str, Any] = {"method": method}
    if method == "mxfp4_dualscale":
        options["num_bf16_fallback_layers"] = 0
    x = torch.randn(2, M, 320, dtype=BF16)
    report = omniq.explain(Holder(forward, w=w, b=b), [x], options, target=place)
    return report.graphs[0].programs["lowered"]


@pytest.mark.parametrize(
    ("place", "method", "M", "operator"),
    [
        ("cuda:sm_90", "int8", 33, "triton_row_scaled_gemm"),
        ("rocm:gfx942", "int8", 33, "triton_row_scaled_gemm"),
        ("cuda:sm_80", "fp8", 33, "triton_decoded_gemm"),
        ("cuda:sm_100", "mxfp4", 33, "triton_mx_gemm"),
        ("rocm:gfx950", "mxfp4_dualscale", 33, "triton_mx_gemm"),
        ("cuda:sm_89", "mxfp8", 33, "triton_decoded_gemm"),
        ("cuda:sm_90", "mxfp4_dualscale", 300, "triton_decoded_gemm"),
    ],
)
def test_one_operator_multiplies_scales_and_adds_the_bias(
    place: str, method: str, M: int, operator: str
) -> None:
    program = lowered(place, method, M)
    assert program.count("omniq.triton_") == 1
    assert f"omniq.{operator}" in program
    assert "_mm(" not in program
    tail = program[program.index(f"omniq.{operator}") :]
    # Nothing is left to do to its result but to return it.
    assert " + " not in tail
    assert ".to(" not in tail


def test_more_rows_than_a_tile_have_their_weight_decoded_once_by_the_graph() -> None:
    # Two sequences: 128 rows in all, and 130.
    few, many = (lowered("cuda:sm_80", "mxfp4_dualscale", M) for M in (64, 65))
    assert "torch.bfloat16" in many.split("triton_decoded_gemm")[0]
    assert many.count(" = ") > few.count(" = ")


@pytest.mark.parametrize(("M", "N"), [(1, 18432), (77, 3072), (4096, 3072), (16384, 12288)])
def test_a_tile_is_no_taller_than_its_rows_want(M: int, N: int) -> None:
    for (kernel, arch), row in tiles.TILES.items():
        tile = tiles.choose(kernel, arch, M, N, processors=132)
        assert tile in row
        assert tile.block_m == row[-1].block_m or tile.block_m < 2 * M
        if M >= 4096:
            assert tile.block_m >= 128


@pytest.mark.parametrize(
    ("M", "N", "block_m", "block_n", "block_k"),
    [
        (4096, 3072, 256, 128, 128),
        (1024, 12288, 256, 128, 128),
        (1024, 3072, 128, 64, 128),  # 256 columns would leave a third of the SMs without a tile
        (512, 5120, 128, 64, 128),
        (128, 12288, 128, 64, 128),
        (64, 12288, 64, 64, 128),
        (128, 3072, 64, 64, 256),
        (2, 3072, 64, 64, 256),
        (2, 18432, 64, 64, 128),
    ],
)
def test_the_tile_is_the_one_that_was_the_fastest_on_an_h200(
    M: int, N: int, block_m: int, block_n: int, block_k: int
) -> None:
    """Times of each: docs/benchmarks/2026-11-26-nvidia-h200-tiles.md."""
    tile = tiles.choose("row_scaled", "sm_90", M, N, processors=132)
    assert (tile.block_m, tile.block_n, tile.block_k) == (block_m, block_n, block_k)
    assert tile.persistent == (block_m == 256)
    unaligned = tiles.choose("row_scaled", "sm_90", M, N, processors=132, tma=False)
    assert not unaligned.persistent
    assert unaligned.block_m == min(block_m, 128)


def test_one_row_has_a_tile_of_its_own_on_sm_90_alone() -> None:
    for kernel, arch in tiles.TILES:
        one = tiles.choose(kernel, arch, 1, 18432, processors=132)
        has = arch == "sm_90" and kernel in ("row_scaled", "decoded", "decoded_scaled")
        assert (one.block_m == 1) == has
        assert tiles.choose(kernel, arch, 2, 18432, processors=132).block_m > 1


def test_a_tall_matrix_is_not_cut_into_tiles_of_few_rows() -> None:
    assert tiles.choose("row_scaled", "sm_80", 100, 3072, processors=108).block_m == 128
    assert tiles.choose("row_scaled", "sm_80", 64, 3072, processors=108).block_m == 16


@pytest.mark.parametrize(("M", "N"), [(1, 18432), (77, 3072), (4096, 3072), (16384, 12288)])
def test_what_is_timed_are_the_chosen_tile_and_others_that_fit(M: int, N: int) -> None:
    assert set(tiles.TRIED) < set(tiles.TILES)
    for (kernel, arch), row in tiles.TILES.items():
        known = row + tiles.TRIED.get((kernel, arch), ())
        first, *others = tiles.candidates(kernel, arch, M, N, processors=132)
        assert first == tiles.choose(kernel, arch, M, N, processors=132)
        assert first not in others
        assert set(others) < set(known)
        assert len(set(others)) == len(others) < 8
        for tile in others:
            assert tile.block_m < max(2 * M, first.block_m + 1)
            assert 4 * tile.block_m * tile.block_n >= first.block_m * first.block_n
        unaligned = tiles.candidates(kernel, arch, M, N, processors=132, tma=False)
        assert not any(tile.persistent for tile in unaligned)
    many = tiles.candidates("row_scaled", "sm_90", 4096, 3072, processors=132)
    assert {(t.block_m, t.block_n) for t in many} > {(128, 256), (256, 128), (128, 128)}
    assert {t.persistent for t in many} == {True, False}


def test_every_architecture_that_a_row_names_has_tiles_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_up: set[tuple[str, str]] = set()

    def choose(kernel: str, arch: str, *sizes: int) -> tiles.Tile:
        looked_up.add((kernel, arch))
        return tiles.choose(kernel, arch, *sizes)

    monkeypatch.setattr(launch, "choose", choose)
    monkeypatch.setattr(launch, "run", lambda launched: None)
    schemes = [get_scheme(method) for method in METHODS]
    schemes += [get_scheme("mxfp4", scale_alg=2), w4a8(MXFP4), blocks(128, 128)]
    for device in ("cuda", "rocm"):
        for kernel in registry.kernels_of(device):
            if not kernel.source.startswith("triton_kernels/"):
                continue
            ran = 0
            machines = [here for here, archs in RUNS.items() if {*archs} & {*kernel.archs}]
            own = [f"{device}:{arch}" for arch in kernel.archs]
            places = [Target.parse(place) for place in dict.fromkeys([*own, *machines])]
            archs = [place.arch for place in places if place.device == device]
            for arch, scheme, M in product(archs, schemes, (4, 200)):
                problem = Problem(M, 512, 64, 2, 2, BF16)
                if scheme.method != kernel.method or kernel.refuse(problem, scheme) is not None:
                    continue
                place = launch.Device(arch, 132)
                monkeypatch.setattr(launch, "device_of", lambda device, place=place: place)
                weight = get_format(scheme.weight).quantize(torch.randn(64, 512))
                x = kernel.quantize(torch.randn(M, 512).to(BF16), scheme.activation)
                assert kernel.gemm(x, weight, None, problem, scheme).shape == (M, 64)
                ran += 1
            assert ran >= len(archs), kernel.name
    assert looked_up == set(tiles.TILES)


def test_a_machine_without_triton_lowers_and_says_so_where_it_would_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "import omniq_compile, sys; omniq_compile.kernels(); print('triton' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen("cuda:sm_90", INT8, layer()) == ("cuda_s8_triton", "")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(
        sys.modules, "omniq_compile.lowering.triton_kernels.row_scaled_gemm", raising=False
    )
    with pytest.raises(OmniqError, match=r"needs Triton.*omniq-compile\[triton\]"):
        launch.function("row_scaled_gemm")


def test_sm_89_multiplies_fp8_itself_where_torchs_kernel_hangs_off_the_default_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {}
    for version in ("2.11.0", "2.12.0"):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        names[version] = [chosen(f"cuda:sm_{n}", FP8, layer())[0] for n in (89, 90)]
    torchs = "cuda_fp8_scaled_mm"
    assert names == {"2.11.0": ["cuda_fp8_triton", torchs], "2.12.0": [torchs, torchs]}


def test_a_gpu_machine_without_triton_falls_to_torchs_own_gemm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else found(name)
    )
    assert chosen("cuda:sm_80", INT8, layer()) == (
        "cuda_s8_int_mm",
        "cuda_s8_triton: Triton is not installed",
    )
    assert chosen("cuda:sm_90", FP8, layer(64))[0] == "cuda_fp8_scaled_mm"


def test_operands_on_a_cpu_are_an_error() -> None:
    codes, scale = torch.zeros(3, 64, dtype=torch.int8), torch.ones(3)
    with pytest.raises(OmniqError, match="operands are on 'cpu'"):
        torch.ops.omniq.triton_row_scaled_gemm(codes, scale, codes, scale, None, BF16, False)


def test_a_bias_of_one_element_is_an_error_where_n_would_be_read() -> None:
    codes, scale = torch.zeros(3, 64, dtype=torch.int8), torch.ones(3)
    said = r"omniq::triton_row_scaled_gemm: the bias is \[1\].*N = 3"
    with pytest.raises(OmniqError, match=said):
        torch.ops.omniq.triton_row_scaled_gemm(codes, scale, codes, scale, scale[:1], BF16, False)


def test_k_is_a_number_whatever_the_activation_knows_of_it() -> None:
    """With changing resolutions Z-Image's patches have an expression for K, and tiles need one."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    a = mode.from_tensor(torch.empty(37, 192, dtype=torch.int8), static_shapes=False)
    assert isinstance(a.shape[1], torch.SymInt)
    with mode:
        rows, b, columns = torch.empty(37), torch.empty(48, 192, dtype=torch.int8), torch.empty(48)
        out, device = torch.empty(37, 48, dtype=torch.bfloat16), launch.Device("sm_90", 132)
        made = launch.row_scaled(a, rows, b, columns, None, out, fnuz=False, device=device)
    assert type(made.arguments["K"]) is int
    assert made.arguments["K"] == 192


def test_a_tile_for_each_processor_keeps_all_of_them_busy() -> None:
    """Of 1408 x 768 in tiles of 128 x 64 there are 11 x 12."""
    chosen = [tiles.choose("row_scaled", "sm_90", 1408, 768, count) for count in (132, 133)]
    assert [(tile.block_m, tile.block_n) for tile in chosen] == [(128, 64), (64, 64)]
