"""Programs that Inductor generates for NVIDIA GPUs, on a machine that may have none."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import generated_triton
import pytest
import torch
from conftest import error, traced
from generated_cuda import (
    BF16,
    VARIANTS,
    Block,
    Case,
    Layer,
    Mlp,
    SingleStream,
    interpret,
    interpreted,
    launches,
    make,
)

from omniq_compile import QuantConfig
from omniq_compile.inspector import absent_gpu, generated
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.target import Target
from omniq_compile.lowering.triton_kernels import launch
from omniq_compile.passes import pipeline
from omniq_compile.passes.context import Context

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")

# One tile holds 128 rows, and weights are decoded before for more.
ROWS, WIDTH = 150, 256


def block_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, ROWS, WIDTH, generator=generator)
    return x.to(BF16), torch.randn(1, WIDTH, generator=generator).to(BF16)


@cache
def block(variant: str, arch: str) -> Case:
    torch.manual_seed(0)
    model = Mlp() if variant == "mxfp4_dualscale" else Block()
    return make(model, block_inputs(), variant, f"cuda:{arch}")


# Of the block, by variant and architecture: how many kernels Inductor generates, and what
# multiplies. Six suffice where the parts of an activation are computed together: five activations
# for seven layers, each quantized where it is computed, and the last sum.
ROW_SCALED = {"row_scaled_gemm": 7}
SCALED_MM = {"extern_kernels._scaled_mm": 7}
DECODED = {"decoded_gemm": 1, "extern_kernels.addmm": 5, "extern_kernels.mm": 1}
PROGRAMS: dict[tuple[str, str], tuple[int, dict[str, int]]] = {
    ("int8", "sm_90"): (6, ROW_SCALED),
    ("int8", "sm_80"): (6, ROW_SCALED),
    ("int8", "sm_100"): (9, {"row_scaled_gemm": 1, "extern_kernels._int_mm": 6}),
    ("int8 timed", "sm_90"): (6, ROW_SCALED),
    # Results of a few tiles, and any others.
    ("fp8", "sm_90"): (6, ROW_SCALED),
    ("fp8", "sm_120"): (6, SCALED_MM),
    # Layer norm is a kernel of its own before scales per block.
    ("fp8 block-wise", "sm_90"): (7, {"block_scaled_gemm": 7}),
    # Six weights are decoded for more than one tile of rows.
    ("fp8", "sm_80"): (11, {"decoded_gemm": 7}),
    ("mxfp8", "sm_90"): (13, DECODED),
    ("mxfp4 W4A8", "sm_120"): (13, DECODED),
    ("mxfp4 W4A8", "sm_100"): (7, {"mx_gemm": 7}),
    ("mxfp4", "sm_100"): (7, {"mx_gemm": 7}),
    # Scales of activations are swizzled, and those of weights come so.
    ("mxfp8", "sm_100"): (14, SCALED_MM),
    # Of two layers. A row is shorter than a run of 512 here, which takes a kernel more a layer.
    ("mxfp4_dualscale", "sm_90"): (14, {"decoded_gemm": 2}),
}


# Left to `make zoo`: what differs from one that stays by its architecture alone.
ALIKE = [("int8", "sm_80"), ("mxfp4 W4A8", "sm_120")]


@pytest.mark.parametrize(
    ("variant", "arch"),
    [pytest.param(*of, marks=[pytest.mark.zoo] if of in ALIKE else []) for of in PROGRAMS],
)
def test_inductor_launches_each_gemm_and_quantizes_once(variant: str, arch: str) -> None:
    program = block(variant, arch).program
    generated_count, multiplied = launches(program)
    expected_count, expected = PROGRAMS[variant, arch]
    assert multiplied == expected
    # Inductor of torch 2.11 and 2.12 fuses loops of other shapes less, that of 2.15 one more.
    if torch.__version__ >= "2.15":
        assert expected_count - 1 <= generated_count <= expected_count
    elif torch.__version__ >= "2.13":
        assert generated_count == expected_count
    # q, k and v read one activation's codes, which Inductor would store for each of them.
    read = re.findall(r"^ +(?:row|block)_scaled_gemm_\d+\.run\((\w+),", program, re.M)
    assert len(set(read)) == len(read) - 2 * (len(read) == 7)
    for kernel in generated_triton.kernels(program):
        assert ".target sm_" in generated_triton.compile_kernel(kernel, arch)


def on_codes(shape: tuple[int, ...], variant: str) -> torch.Tensor:
    """Return values that are codes already: no division that rounds otherwise moves one.

    A GPU multiplies by 1 / 448, and its division has an error of up to 2 units in the last place.
    """
    scheme = QuantConfig.from_options(VARIANTS[variant]).scheme
    generator = torch.Generator().manual_seed(5)
    form = get_format(scheme.activation)
    x = form.dequantize(form.quantize(torch.randn(*shape, generator=generator).to(BF16)))
    return x[..., : shape[-1]].to(BF16)


BLOCKS = [
    ("int8", "sm_90"),
    ("fp8", "sm_90"),
    ("fp8 block-wise", "sm_90"),
    ("fp8", "sm_80"),
    ("fp8", "sm_120"),
    ("mxfp8", "sm_90"),
    ("mxfp8", "sm_100"),
    ("mxfp4 W4A8", "sm_100"),
    ("mxfp4_dualscale", "sm_90"),
]
LAYERS = [
    *((variant, "sm_90") for variant in VARIANTS),
    ("int8", "sm_80"),
    ("fp8", "sm_80"),
    ("fp8 block-wise", "sm_80"),
    ("mxfp4", "sm_100"),
    ("mxfp4 W4A8", "sm_100"),
    ("mxfp4_dualscale", "sm_120"),
]
# Traced for one number of rows, and called with another.
SYMBOLIC = [
    ("int8", "sm_90"),
    ("int8 timed", "sm_90"),
    ("fp8", "sm_80"),
    ("fp8 block-wise", "sm_90"),
    ("mxfp4 W4A8", "sm_100"),
]


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """The block, and one layer for one tile of rows and for two, whose input is on its codes."""
    found = {f"block {variant} {arch}": block(variant, arch) for variant, arch in BLOCKS}
    for variant, arch in LAYERS:
        for rows in (37, 150):
            torch.manual_seed(1)
            x = on_codes((rows, 192), variant)
            found[f"layer {variant} {arch} {rows}"] = make(Layer(), (x,), variant, f"cuda:{arch}")
    for variant, arch in SYMBOLIC:
        x, later = (on_codes((rows, 192), variant) for rows in (37, 150))
        found[f"symbolic {variant} {arch}"] = make(Layer(), (x,), variant, f"cuda:{arch}", later)
    torch.manual_seed(2)
    image, later, text = (torch.randn(rows, 192).to(BF16) for rows in (37, 150, 7))
    for variant in ("int8", "fp8"):
        case = make(SingleStream(), (image, text), variant, "cuda:sm_90", later)
        found[f"two streams {variant}"] = case
    return found


@pytest.fixture(scope="module")
def results(
    cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[torch.Tensor]]:
    return interpret(cases, tmp_path_factory.mktemp("interpreted"))


@interpreted
@pytest.mark.parametrize(("variant", "arch"), LAYERS)
@pytest.mark.parametrize("rows", [37, 150])
def test_a_layer_is_quantized_and_multiplied_as_the_reference_does(
    cases: dict[str, Case], results: dict[str, Any], variant: str, arch: str, rows: int
) -> None:
    name = f"layer {variant} {arch} {rows}"
    (out,), expected = results[name], cases[name].expected
    assert (out.shape, out.dtype) == ((rows, 112), BF16)
    # Activations stay as they are on sm_80: codes times their scale, rounded to BF16.
    weights_only = variant.startswith("fp8") and arch == "sm_80"
    assert error(out, expected) < (4e-3 if weights_only else 1e-4)


@interpreted
@pytest.mark.parametrize(("variant", "arch"), BLOCKS)
def test_a_block_is_what_the_reference_makes_of_it(
    cases: dict[str, Case], results: dict[str, Any], variant: str, arch: str
) -> None:
    name = f"block {variant} {arch}"
    (out,), expected = results[name], cases[name].expected
    assert out.dtype is BF16
    # Fused operations skip roundings to BF16, and some values fall on a neighbouring code.
    assert error(out, expected) < (0.05 if variant == "mxfp4_dualscale" else 0.02)


def tiles(case: Case) -> list[tuple[int, int, bool]]:
    """Return rows and columns of what omniq's only kernel may compute, and whether it persists."""
    (own,) = (kernel for kernel in generated_triton.kernels(case.program) if kernel.is_own)
    # Where there is one, Inductor fixes its parameters.
    return [
        (c["BLOCK_M"], c["BLOCK_N"], c["PERSISTENT"])
        for c in (own.constants | config for config in own.configs)
    ]


def test_inductor_times_tiles_where_it_is_told_to(cases: dict[str, Case]) -> None:
    assert tiles(cases["layer int8 sm_90 150"]) == [(64, 64, False)]
    first, *others = tiles(cases["layer int8 timed sm_90 150"])
    assert first == (64, 64, False)
    assert {(128, 64, False), (64, 128, False), (256, 128, True)} < set(others)


def test_tma_is_not_tried_where_it_cannot_load_a_row() -> None:
    x = on_codes((150, 200), "int8")
    found = tiles(make(Layer(K=200), (x,), "int8 timed", "cuda:sm_90"))
    assert len(found) > 2
    assert not any(persistent for _, _, persistent in found)


@pytest.mark.parametrize("symbolic", [False, True])
def test_a_large_result_is_loaded_by_tma_in_one_program_an_sm(symbolic: bool) -> None:
    x, later = torch.randn(1500, 64).to(BF16), torch.randn(1800, 64).to(BF16)
    case = make(Layer(64, 3072), (x,), "int8", "cuda:sm_90", later if symbolic else None)
    assert tiles(case) == [(256, 128, True)]
    (started,) = re.findall(r"row_scaled_gemm_0\.run\(.*", case.program)
    # 6 x 24 tiles are more than there are SMs.
    assert ("min(132, " if symbolic else " 132, 1, 1,") in started
    unaligned = make(Layer(72, 3072), (torch.randn(1500, 72).to(BF16),), "int8", "cuda:sm_90")
    assert tiles(unaligned) == [(128, 256, False)]


def test_a_large_float32_result_leaves_no_room_for_tma() -> None:
    a, b = (torch.randint(-9, 9, (rows, 64), dtype=torch.int8) for rows in (1500, 3072))
    device = launch.Device("sm_90", 132)
    for dtype, block, persistent in ((BF16, (256, 128), True), (torch.float32, (128, 256), False)):
        out = torch.empty(1500, 3072, dtype=dtype)
        scales = torch.ones(1500), torch.ones(3072)
        (tile,) = launch.row_scaled(a, scales[0], b, scales[1], None, out, False, device).tiles
        assert ((tile.block_m, tile.block_n), tile.persistent) == (block, persistent)


def test_cuda_graphs_capture_the_same_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "captured", {"method": "int8", "mode": "reduce-overhead"})
    x = on_codes((37, 192), "int8")
    captured, usual = (
        make(Layer(), (x,), variant, "cuda:sm_90").program for variant in ("captured", "int8")
    )
    assert launches(captured) == launches(usual) == (1, {"row_scaled_gemm": 1})


def test_a_wrong_scale_would_be_found(cases: dict[str, Case]) -> None:
    expected = cases["layer int8 sm_90 37"].expected
    assert error(expected * 1.01, expected) > 5e-3


@interpreted
@pytest.mark.parametrize(("variant", "arch"), SYMBOLIC)
def test_a_symbolic_number_of_rows_is_launched_too(
    cases: dict[str, Case], results: dict[str, Any], variant: str, arch: str
) -> None:
    name = f"symbolic {variant} {arch}"
    (out,), case = results[name], cases[name]
    assert not any("omniq" in called for called in launches(case.program)[1])
    assert out.shape == (150, 112)
    assert error(out, case.expected) < (4e-3 if variant == "fp8" else 1e-4)


@interpreted
@pytest.mark.parametrize("variant", ["int8", "fp8"])
def test_rows_of_text_and_of_an_image_that_changes_are_quantized(
    cases: dict[str, Case], results: dict[str, Any], variant: str
) -> None:
    (out,), case = results[f"two streams {variant}"], cases[f"two streams {variant}"]
    # Inductor of torch 2.12 and 2.13 failed to divide rows * 960 elements among the rows.
    assert out.shape == (1, 157, 192)
    assert error(out, case.expected) < 0.02


def test_symbolic_columns_leave_the_launch_to_the_call() -> None:
    a, b = torch.randn(70, 64).to(BF16), torch.randn(90, 64).to(BF16)
    torch._dynamo.mark_dynamic(b, 0)
    ((graph, _),) = traced(lambda a, b: a @ b.t(), a, b)
    config = QuantConfig.from_options({"method": "int8", "min_features": 1, "matmul": True})
    context = Context(config, Target.parse("cuda:sm_90"), stages={})
    lowered = pipeline.run(graph, context)
    assert absent_gpu.why_not(context.target) is None
    program = generated.program(lowered, {}, context.target)
    assert launches(program)[1] == {"torch.ops.omniq.triton_row_scaled_gemm.default": 1}


def test_attention_with_a_mask_is_the_operator_that_takes_one() -> None:
    mask = torch.zeros(1, 1, ROWS, ROWS).to(BF16)
    program = make(Block(), (*block_inputs(), mask), "int8", "cuda:sm_90").program
    assert "aten._scaled_dot_product_efficient_attention" in program
    assert "aten._scaled_dot_product_flash_attention" in block("int8", "sm_90").program


def test_what_was_replaced_is_put_back() -> None:
    from torch._dynamo.device_interface import device_interfaces

    def state() -> list[Any]:
        names = ("get_device_properties", "get_device_capability", "is_available")
        found = [getattr(torch.cuda, name) for name in names]
        return [*found, dict(device_interfaces), triton.runtime.driver._active]

    def fail(target: Target) -> None:
        with absent_gpu.present(target):
            assert state() != before
            raise RuntimeError("on the way")

    assert absent_gpu.why_not(Target.parse("cuda:sm_90")) is None
    before = state()
    with pytest.raises(RuntimeError, match="on the way"):
        fail(Target.parse("cuda:sm_90"))
    assert state() == before
    assert not torch.cuda.is_available()


def test_each_architecture_is_asked_for_its_own_properties() -> None:
    for arch, processors in (("sm_80", 108), ("sm_90", 132)):
        program = make(Layer(), (torch.randn(5, 192).to(BF16),), "int8", f"cuda:{arch}").program
        assert f"multi_processor_count={processors}, cc={arch.removeprefix('sm_')}" in program


@pytest.mark.parametrize("target", ["rocm:gfx942", "xpu:xe", "npu:ascend950"])
def test_other_devices_have_to_be_here(target: str) -> None:
    reason = absent_gpu.why_not(Target.parse(target))
    assert reason is not None
    assert f"for {target} only where there is one" in reason
