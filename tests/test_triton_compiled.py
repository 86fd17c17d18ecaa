"""Each Triton GEMM compiled for each architecture: its instructions, spills and shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from triton_offline import FOR_EARLIER, ONE_ROW, Case, cases

pytest.importorskip("triton")

# Of these, whose rows are alike, `make test` compiles what is multiplied natively and one decoded
# format.
ALIKE = ("gfx90a", "gfx1100", "gfx1201")


def marks(case: Case) -> list[pytest.MarkDecorator]:
    """Leave to `make zoo` what runs under ``max_autotune`` alone, but for the tiles of TMA."""
    timed = case.tile and (case.a, case.arch) != ("int8", "sm_90")
    alike = case.arch in ALIKE and case.a == "real" and case.b != "mxfp4"
    earlier = (case.a, case.b) in ((a, b) for a, b, archs in FOR_EARLIER if case.arch in archs)
    return [pytest.mark.zoo] if timed or alike or earlier else []


by_case = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=marks(c), id=str(c)) for c in cases()]
)

# Bytes of shared memory that a block may use: CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability" ("Maximum amount of shared memory per thread block"); LDS of a workgroup:
# AMD CDNA 2 to 4 and RDNA 3 and 4 ISA reference guides, "Local Data Share".
KIB = 1024
SHARED = {
    "sm_80": 99 * KIB,  # of 8.6, such as an RTX 3090, which has its kernels; of 8.0 it is 163
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx90a": 64 * KIB,
    "gfx942": 64 * KIB,
    "gfx950": 160 * KIB,
    "gfx1100": 64 * KIB,
    "gfx1201": 64 * KIB,
}

# Bytes a thread. Triton 3.8 has up to 112 on the stack for MX on sm_100, 3.9 up to 24 on sm_90.
SPILLED = 0 if metadata.version("triton") < "3.8" else 112

# The one matrix instruction that makes a product native: another beside it would be a fallback.
INT8 = {
    "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    "sm_80": r"mma\.sync\.\S*\.s32\.s8\.s8\.s32",
    # Triton before 3.8 has no tcgen05.mma kind::i8.
    "sm_100": r"mma\.sync\.\S*\.s32\.s8\.s8\.s32|tcgen05\.mma\.cta_group::1\.kind::i8",
    "gfx942": r"v_mfma_i32_\d+x\d+x\d+_?i8",
    "gfx1100": r"v_wmma_i32_16x16x16_iu8",
}
INT8 |= {arch: INT8["sm_80"] for arch in ("sm_89", "sm_120")}
INT8 |= {"gfx950": INT8["gfx942"], "gfx90a": INT8["gfx942"], "gfx1201": INT8["gfx1100"]}
FP8 = {
    "sm_89": r"mma\.sync\.\S*\.f32\.e4m3\.e4m3\.f32",
    "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3",
    "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::f8f6f4",
    "gfx942": r"v_mfma_f32_\d+x\d+x\d+_fp8_fp8",
    "gfx950": r"v_mfma_f32_\d+x\d+x\d+_f8f6f4",
    "gfx1201": r"v_wmma_f32_16x16x16_fp8_fp8",
}
FP8["sm_120"] = FP8["sm_89"]
BFLOAT16 = {
    "sm_80": r"mma\.sync\.\S*\.f32\.bf16\.bf16\.f32",
    "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    "gfx942": r"v_mfma_f32_\d+x\d+x\d+_bf16",
    "gfx90a": r"v_mfma_f32_\d+x\d+x\d+bf16_1k",
    "gfx1100": r"v_wmma_f32_16x16x16_bf16",
}
BFLOAT16 |= {arch: BFLOAT16["sm_80"] for arch in ("sm_89", "sm_120")}
BFLOAT16["sm_100"] = r"tcgen05\.mma\.cta_group::1\.kind::f16"
BFLOAT16["gfx1201"] = BFLOAT16["gfx1100"]
# PTX has two words for one scale for 32 elements; Triton writes the second from 3.8 on.
E4M3_SCALED = {
    "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::mxf8f6f4\.block_scale\.(scale_vec::1X|block32)",
    "sm_120": r"mma\.sync\.\S*kind::mxf8f6f4\.block_scale\.scale_vec::1X\.f32\.e4m3\.e4m3\S*ue8m0",
    "gfx950": r"v_mfma_scale_f32_\d+x\d+x\d+_f8f6f4",
}
E2M1_SCALED = {
    "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::mxf4\.block_scale\.(scale_vec::2X|block32)",
    "sm_120": r"mma\.sync\.\S*kind::mxf4\w*\.block_scale\.scale_vec::2X\.f32\.e2m1\.e2m1\S*ue8m0",
    "gfx950": E4M3_SCALED["gfx950"],
}


def native(case: Case) -> str:
    if case.a == "real":
        return BFLOAT16[case.arch]
    if case.b == "int8":
        return INT8[case.arch]
    if case.b.startswith("fp8"):
        return FP8[case.arch]
    return (E4M3_SCALED if case.a == "mxfp8" else E2M1_SCALED)[case.arch]


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Compile the cases of the tests that were selected."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    given = [item.callspec.params for item in items if hasattr(item, "callspec")]
    names = [str(found["case"]) for found in given if isinstance(found.get("case"), Case)]
    cache = tmp_path_factory.mktemp("triton_cache")
    script = Path(__file__).with_name("triton_offline.py")
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    # What is done by the time that this ends is reported, and the rest fails by name.
    process = subprocess.Popen(
        [sys.executable, str(script), *names],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        out = process.communicate(timeout=900)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        out = process.communicate()[0]
    lines = out.splitlines()
    return dict(json.loads(line) for line in lines if line.startswith("["))


@by_case
def test_it_compiles_to_native_instructions_without_spills(
    reports: dict[str, Any], case: Case
) -> None:
    report = reports[str(case)]
    assert "error" not in report
    if case.M == ONE_ROW:
        assert report["tile"]["block_m"] == 1
    assert bool(report["instructions"]) == (case.M > ONE_ROW)
    assert [i for i in report["instructions"] if not re.fullmatch(native(case), i)] == []
    assert report["spilled"] <= SPILLED
    assert report["tma"] == report["warp_specialized"] == report["tile"]["persistent"]
    # Of masks that change along K it makes wrong sums (triton-lang/triton#10585).
    assert not (report["takes_turns"] and case.ragged)
    assert 0 < report["shared"] <= SHARED[case.arch]
    # Subnormal elements are float32 denormals while they are decoded.
    assert not report["flushes_denormals"]
