"""GEMMs through torch._scaled_mm: their layouts, their limits, and their numbers on CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from omniq_compile.lowering import reference, registry, scaled_mm
from omniq_compile.lowering.cuda import int8 as cuda_int8
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.rocm import mx as rocm_mx
from omniq_compile.lowering.schemes import get_scheme, w4a8
from omniq_compile.lowering.target import Target

BF16 = torch.bfloat16


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 4), (129, 5), (300, 12), (77, 3)])
def test_scales_lie_where_the_layout_says(rows: int, columns: int) -> None:
    scale = torch.randint(0, 255, (rows, columns), dtype=torch.uint8)
    flat = scaled_mm.swizzle(scale).view(torch.uint8)
    tiles = -(-columns // 4)
    m = torch.arange(rows)[:, None]
    k = torch.arange(columns)[None]
    offset = (m // 128 * tiles + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
    assert torch.equal(flat[offset], scale)
    assert flat.numel() == -(-rows // 128) * tiles * 512


def test_a_layout_of_any_number_of_row_tiles_is_compiled_once() -> None:
    """But for a single tile; and each call checks little, where PyTorch had guessed a size."""
    environments = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        environments.append(inputs[0].node.shape_env)
        return gm

    compiled = torch.compile(scaled_mm.swizzle, backend=backend, dynamic=True)
    for rows in (300, 256, 129, 1000):
        scale = torch.randint(0, 255, (rows, 6), dtype=torch.uint8)
        laid_out = scaled_mm.swizzle(scale)
        assert torch.equal(compiled(scale).view(torch.uint8), laid_out.view(torch.uint8))
    (environment,) = environments
    assert len(environment.guards) < 10


def test_scales_lie_where_torchao_puts_them() -> None:
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scale = torch.randint(0, 255, (200, 9), dtype=torch.uint8)
    theirs = utils.to_blocked(scale, use_triton_kernel=False).flatten()
    assert torch.equal(scaled_mm.swizzle(scale).view(torch.uint8), theirs)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 takes no scale per row on CPUs, only one"
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(37,), (2, 5)])
def test_rows_multiply_as_the_reference_does(leading: tuple[int, ...], bias: bool) -> None:
    K, N = 208, 80
    x = torch.randn(*leading, K, dtype=BF16) * torch.rand(*leading, 1, dtype=BF16).exp2()
    w = torch.randn(N, K, dtype=BF16)
    x[..., 0, :] = 0
    b = torch.randn(N, dtype=BF16) if bias else None
    fp8 = get_format("fp8")
    a_parts, b_parts = fp8.quantize(x), fp8.quantize(w)
    problem = Problem(leading[-1], K, N, x.dim(), 2, BF16)
    out = scaled_mm.gemm_rows(a_parts, b_parts, b, problem, get_scheme("fp8"))
    assert out.shape == (*leading, N)
    assert out.dtype == BF16
    expected = reference.gemm(a_parts, b_parts, b, "fp8", "fp8", torch.float32)
    # Half a unit in the last place of bfloat16, and the order of accumulation.
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 2.5e-3
    exact = x.double() @ w.double().t() + (0 if b is None else b.double())
    assert (out.double() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    ("method", "K", "N", "said"),
    [
        ("fp8", 200, 64, "K = 200 is not a multiple of 16"),
        ("fp8", 64, 72, "N = 72 is not a multiple of 16"),
        ("mxfp8", 80, 64, "K = 80 is not a multiple of 32"),
    ],
)
def test_what_the_operator_cannot_take_goes_to_the_next_kernel(
    method: str, K: int, N: int, said: str
) -> None:
    scheme = get_scheme(method)
    good = Problem(64, 128, 128, 2, 2, BF16)
    first, why = registry.choose(scheme, Target("cuda", "sm_100"), good)
    assert first is not None
    assert (first.name, why) == (f"cuda_{method}_scaled_mm", "")
    kernel, why = registry.choose(scheme, Target("cuda", "sm_100"), Problem(64, K, N, 2, 2, BF16))
    assert kernel is not None
    assert kernel.name != first.name
    assert said in why


def test_other_results_and_batches_and_blocks_are_refused() -> None:
    fp8, mx = get_scheme("fp8"), get_scheme("mxfp8")
    refuse = scaled_mm.refuse_rows
    assert refuse(Problem(64, 128, 128, 3, 2, BF16), fp8) is None
    assert "float16" in str(refuse(Problem(64, 128, 128, 2, 2, torch.float16), fp8))
    assert "batch" in str(refuse(Problem(64, 128, 128, 3, 3, BF16), fp8))
    block = get_scheme("fp8", weight_block_size=(128, 128))
    assert "per block" in str(refuse(Problem(64, 128, 128, 2, 2, BF16), block))
    assert scaled_mm.refuse_blocks(Problem(64, 128, 128, 2, 2, BF16), mx) is None
    mixed = w4a8(get_scheme("mxfp4"))
    assert "mxfp8" in str(scaled_mm.refuse_blocks(Problem(64, 128, 128, 2, 2, BF16), mixed))


def test_a_rocm_that_reads_scales_as_swizzled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of them in another order would be read without an error."""
    problem = Problem(64, 128, 128, 2, 2, BF16)
    for version, refused in {"7.0.2": False, "7.12.0": False, "7.13.0a1": True}.items():
        monkeypatch.setattr(torch.version, "rocm", version)
        said = rocm_mx.refuse(problem, get_scheme("mxfp4"))
        assert (said is not None and f"swizzled scales with ROCm {version}" in said) == refused


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (Problem(17, 64, 64, 2, 2, BF16), None),
        (Problem(16, 64, 64, 2, 2, BF16), "needs more than 16"),
        (Problem("s0", 64, 64, 2, 2, BF16), None),
        (Problem(64, 60, 64, 2, 2, BF16), "K = 60"),
        (Problem(64, 64, 60, 2, 2, BF16), "N = 60"),
        (Problem(64, 64, 64, 3, 3, BF16), "batch"),
    ],
)
def test_int_mm_on_cuda_has_limits_that_its_fake_does_not_check(
    problem: Problem, said: str | None
) -> None:
    refusal = cuda_int8.refuse(problem, get_scheme("int8"))
    assert refusal is None if said is None else said in str(refusal)
