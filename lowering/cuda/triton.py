"""omniq's own kernels on NVIDIA GPUs, see `triton_kernels`.

Against cuBLASLt, int8 is a matter of the int32 matrix that `torch._int_mm` stores and a second
kernel reads: 8 bytes an element of the result, which at 2 K operations an element takes
``4 * peak / (K * bandwidth)`` times as long as the product does. For K = 3072 that is 0.5 on an
H200, 0.4 on an A100 and more on smaller GPUs, so the Triton kernel, which stores no such matrix,
goes first wherever it has the fast instruction. On an H200 4096 x 12288 x 3072 takes it 262 us, and
`torch._int_mm` alone 535. On sm_100 Triton before 3.8 has only the ``mma`` of the architectures
before, and cuBLASLt goes first. Other architectures were not timed.

fp8 goes to cuBLASLt where it can, but for results so small that they are one wave of small tiles:
128 x 3072 x 12288 takes it 34 us on an H200, and Triton's tiles of 64 x 64 18.
"""

from __future__ import annotations

from omniq_compile.lowering.triton_kernels import decoded_rows, rows

INT8 = (
    rows.int8("cuda", ("sm_90",), "s8 wgmma"),
    rows.int8("cuda", ("sm_120", "sm_89", "sm_80"), "s8 mma"),
)
INT8_SM_100 = rows.int8("cuda", ("sm_100",), "s8 mma, tcgen05 from Triton 3.8 on")

_FP8 = (
    (("sm_100",), "tcgen05.mma f8f6f4"),
    (("sm_90",), "e4m3 wgmma"),
    (("sm_120", "sm_89"), "e4m3 mma"),
)
# The SMs of an H100 or H200.
_ONE_WAVE = 132
FP8_ONE_WAVE = rows.fp8_few_tiles("cuda", ("sm_90",), "e4m3 wgmma", _ONE_WAVE)
FP8 = (
    *(rows.fp8("cuda", archs, how) for archs, how in _FP8),
    *(rows.fp8_blocks("cuda", archs, how) for archs, how in _FP8),
    decoded_rows.fp8_weight_only_row("cuda", ("sm_80",), "no e4m3 before sm_89"),
)

MX = tuple(
    rows.mx("cuda", (arch,), method, how, mixed=arch == "sm_100")
    for method in ("mxfp8", "mxfp4", "mxfp4_dualscale")
    for arch, how in (("sm_100", "block-scaled tcgen05.mma"), ("sm_120", "block-scaled mma"))
)

# Block scales in the main loop of an fp8 GEMM would be native on sm_89 and sm_90, and slower: a
# product of 32 k takes wgmma about 128 cycles for a tile of 128 x 128, and scaling its sums the
# other cores 256. It would not be exact either: Hopper aligns the products of a step to 14 bits.
BEFORE_BLACKWELL = ("sm_90", "sm_89", "sm_80")
NO_SCALES = "no block-scaled arithmetic before sm_100"
_TILES = ((("sm_89", "sm_80"), decoded_rows.TILE_ROWS), (("sm_90",), 64))
DECODED = (
    *(
        decoded_rows.mx_row("cuda", archs, method, NO_SCALES, most)
        for archs, most in _TILES
        for method in ("mxfp8", "mxfp4")
    ),
    decoded_rows.mx_row("cuda", ("sm_120",), "mxfp4", "no e4m3 by e2m1 from Triton on sm_120"),
    *(decoded_rows.dualscale_row("cuda", archs, NO_SCALES, most) for archs, most in _TILES),
)
