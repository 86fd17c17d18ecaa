"""omniq's own kernels on NVIDIA GPUs, see `triton_kernels`.

Against cuBLASLt, int8 is a matter of the int32 matrix that `torch._int_mm` stores and a second
kernel reads: 8 bytes an element of the result, which at 2 K operations an element takes
``4 * peak / (K * bandwidth)`` times as long as the product does. For K = 3072 that is 0.5 on an
H200, 0.4 on an A100 and more on smaller GPUs, so the Triton kernel, which stores no such matrix,
goes first wherever it has the fast instruction. On sm_100 Triton 3.6 and 3.7 have only the ``mma``
of the architectures before, and cuBLASLt goes first. Both orders are computed, neither was timed.
"""

from __future__ import annotations

from omniq_compile.lowering.triton_kernels import decoded_rows, rows

_FP8_ARCHS = ("sm_120", "sm_100", "sm_90", "sm_89")
_FP8 = "fp8 wgmma, tcgen05.mma or mma"
_SCALED = "mxf4 or mxf8f6f4 instructions"

INT8 = rows.int8("cuda", ("sm_120", "sm_90", "sm_89", "sm_80"), "s8 wgmma or mma")
INT8_LEGACY = rows.int8("cuda", ("sm_100",), "s8 mma, not tcgen05")

FP8 = rows.fp8("cuda", _FP8_ARCHS, _FP8)
FP8_BLOCKS = rows.fp8_blocks("cuda", _FP8_ARCHS, _FP8)
FP8_WEIGHT_ONLY = decoded_rows.fp8_weight_only_row("cuda", ("sm_80",), "no e4m3 before sm_89")

MX = tuple(
    rows.mx("cuda", (arch,), method, _SCALED, mixed=arch == "sm_100")
    for method in ("mxfp8", "mxfp4", "mxfp4_dualscale")
    for arch in ("sm_100", "sm_120")
)

# Block scales in the main loop of an fp8 GEMM would be native on sm_89 and sm_90, and slower: a
# product of 32 k takes wgmma about 128 cycles for a tile of 128 x 128, and scaling its sums the
# other cores 256. It would not be exact either: Hopper aligns the products of a step to 14 bits.
_BEFORE_BLACKWELL = ("sm_90", "sm_89", "sm_80")
_NO_SCALES = "no block-scaled arithmetic before sm_100"
DECODED = (
    decoded_rows.mx_row("cuda", _BEFORE_BLACKWELL, "mxfp8", _NO_SCALES),
    decoded_rows.mx_row("cuda", _BEFORE_BLACKWELL, "mxfp4", _NO_SCALES),
    decoded_rows.mx_row("cuda", ("sm_120",), "mxfp4", "no e4m3 by e2m1 from Triton on sm_120"),
    decoded_rows.dualscale_row("cuda", _BEFORE_BLACKWELL, _NO_SCALES),
)
