"""The arithmetic of the Triton GEMMs, against dequantized operands multiplied in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreter import interpreter_works
from triton_numbers import BF16, CASES, Case, every_code

from omniq_compile.lowering import gpu_quantize
from omniq_compile.lowering.formats import get_format

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not interpreter_works(), reason="Triton 3.6 cannot interpret beside numpy 2.4"
)

PARTS = 2
by_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("interpreted")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("triton_numbers.py")
    files = [folder / f"{part}.pt" for part in range(PARTS)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(file), str(part), str(PARTS)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for part, file in enumerate(files)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return {name: out for file in files for name, out in torch.load(file).items()}


def expected(case: Case) -> torch.Tensor:
    """Dequantize both operands and multiply in float64; weight-only keeps x as it is."""
    x, weight, bias = case.operands()
    left = x.double()
    if "weight_only" not in case.kernel:
        # Which of two codes is taken midway between them is checked in test_gpu_quantize.py.
        parts = gpu_quantize.quantize(x, case.scheme.activation)
        left = get_format(case.scheme.activation).dequantize(parts).double()[..., : case.K]
    right = get_format(case.scheme.weight).dequantize(weight).double()[..., : case.K]
    out = left @ right.t()
    return out if bias is None else out + bias.double()


@by_case
def test_results_are_those_of_dequantized_operands(
    results: dict[str, torch.Tensor], case: Case
) -> None:
    out, exact = results[str(case)], expected(case)
    assert (out.shape, out.dtype) == ((*case.rows, case.N), case.dtype)
    rows, exact_rows = out.view(-1, case.N), exact.view(-1, case.N)
    good = exact_rows.isfinite().all(-1)
    assert good.sum() == rows.shape[0] - 2 * case.has_special_rows
    assert not rows[~good].isfinite().all(-1).any()
    # Half a unit in the last place of the result, and a float32 sum in some order.
    size = exact_rows[good].abs().amax(-1, keepdim=True)
    limit = exact_rows[good].abs() * torch.finfo(case.dtype).eps / 2 + size * 2e-6
    assert ((rows[good].double() - exact_rows[good]).abs() <= limit).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.has_special_rows], ids=str)
def test_a_token_of_zeros_is_the_bias(results: dict[str, torch.Tensor], case: Case) -> None:
    bias = case.operands()[2]
    row = results[str(case)].view(-1, case.N)[1]
    assert torch.equal(row, torch.zeros_like(row) if bias is None else bias.to(case.dtype))


def test_every_row_of_a_triton_kernel_is_run() -> None:
    from omniq_compile.lowering.registry import kernels_of

    rows = {k.name for device in ("cuda", "rocm") for k in kernels_of(device) if "triton" in k.name}
    # The two devices share their kernels, so that one of a pair is enough.
    short = {name.partition("_")[2] for name in rows}
    assert short == {case.kernel.partition("_")[2] for case in CASES}


def test_a_result_in_bfloat16_is_rounded_once(results: dict[str, torch.Tensor]) -> None:
    """An int8 sum times both scales is exact enough to know which BF16 is nearest."""
    case = next(c for c in CASES if "s8" in c.kernel and c.dtype is BF16)
    out, exact = results[str(case)].view(-1, case.N), expected(case).view(-1, case.N)
    good = exact.isfinite().all(-1)
    assert (out[good] == exact[good].to(BF16)).double().mean() > 0.999


@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
def test_every_code_beside_every_scale_is_decoded_exactly(
    results: dict[str, torch.Tensor], element: str
) -> None:
    exact = every_code(element)[1]
    assert (exact != 0).double().mean() > 0.8
    assert torch.equal(results[element].isnan(), exact.isnan())
    assert torch.equal(results[element].nan_to_num().double(), exact.nan_to_num())
