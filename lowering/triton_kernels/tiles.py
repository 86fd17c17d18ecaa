"""Which tile a GEMM is cut into: a few rows an architecture, in place of a long autotuning.

A tile is bounded by shared memory (its stages of a and b), by registers (its sums) and, at the low
end, by the smallest tile that the architecture's instruction takes: ``wgmma`` and ``tcgen05.mma``
want 64 rows for fp8, block-scaled ``tcgen05.mma`` 128, or Triton falls back to a wider type without
a word. What each compiles to is tested. Those of sm_90 are the fastest of the times in
``docs/benchmarks/2026-11-26-nvidia-h200-tiles.md`` and ``-block.md``, but for "decoded_scaled",
which was not timed; no other architecture's were, and Inductor's ``max_autotune`` times those of
`candidates` where it runs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A tile of the result, ``block_m x block_n``, summed over ``block_k`` at a time.

    ``stages`` is how many steps of K are in flight, the one that is being multiplied included.
    ``persistent``: one program an SM computes several tiles, and TMA loads them, see
    `row_scaled_gemm`; ``warps`` are those of a group that multiplies, of which there are two beside
    the one that loads. ``group_m``: rows of tiles that are computed side by side, see
    `tile.tile_origin`.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    persistent: bool = False
    group_m: int = 8

    def count(self, M: int, N: int) -> int:
        """Return how many tiles cover ``[M, N]``."""
        return count(M, N, self.block_m, self.block_n)


def count(M: int, N: int, block_m: int, block_n: int) -> int:
    """Return how many tiles of ``[block_m, block_n]`` cover ``[M, N]``."""
    return -(-M // block_m) * -(-N // block_n)


# Architectures that share rows. AMD's "warps" are wavefronts of 64, of 32 on RDNA.
_AMPERE, _ADA, _HOPPER = ("sm_80",), ("sm_89",), ("sm_90",)
_BLACKWELL, _RTX = ("sm_100",), ("sm_120",)
_CDNA3, _CDNA4 = ("gfx942",), ("gfx950",)
_RDNA4, _CDNA2_RDNA = ("gfx1201",), ("gfx90a", "gfx1100", "gfx1201")

# (kernel, architectures) -> tiles, the largest first, but for those of one row.
#
# One row takes as long as reading the weight does, and tiles of 64 rows read it slowly: on an H200
# 1 x 18432 x 3072 took 35 to 51 us for int8 and 107 to 190 where MX codes are decoded. A tile of
# one row has a wide block of products and no tensor cores, and takes 21; at best it could be 13.
_ROWS: dict[tuple[str, tuple[str, ...]], tuple[Tile, ...]] = {
    # 8-bit codes.
    ("row_scaled", _AMPERE): (Tile(128, 128, 128, 8, 3), Tile(16, 64, 128, 4, 4)),
    ("row_scaled", _ADA + _RTX): (Tile(128, 128, 64, 8, 4), Tile(16, 64, 128, 4, 4)),
    ("row_scaled", _HOPPER): (
        Tile(1, 16, 512, 4, 1),
        Tile(256, 128, 128, 4, 4, persistent=True),
        Tile(128, 256, 128, 8, 3, group_m=16),
        Tile(128, 64, 128, 4, 4),
        Tile(64, 64, 128, 4, 4),
        Tile(64, 64, 256, 4, 4),
    ),
    ("row_scaled", _BLACKWELL): (Tile(128, 128, 128, 8, 4), Tile(64, 64, 128, 4, 4)),
    ("row_scaled", _CDNA3): (Tile(128, 128, 128, 4, 2), Tile(16, 64, 128, 4, 2)),
    ("row_scaled", _CDNA4): (Tile(256, 128, 128, 8, 2), Tile(16, 64, 128, 4, 2)),
    ("row_scaled", _CDNA2_RDNA): (Tile(128, 128, 64, 8, 2), Tile(16, 64, 128, 4, 2)),
    # The same with two sets of sums.
    ("block_scaled", _ADA + _RTX): (Tile(128, 64, 128, 8, 3), Tile(16, 64, 128, 4, 3)),
    ("block_scaled", _HOPPER + _BLACKWELL): (
        Tile(128, 128, 128, 8, 4),
        Tile(64, 128, 128, 4, 4),
        Tile(64, 64, 128, 4, 4),
    ),
    ("block_scaled", _CDNA3): (Tile(128, 128, 64, 8, 2), Tile(16, 64, 128, 4, 2)),
    ("block_scaled", _CDNA4): (Tile(128, 128, 128, 4, 2), Tile(16, 64, 128, 4, 2)),
    ("block_scaled", _RDNA4): (Tile(128, 64, 128, 8, 2), Tile(16, 64, 128, 4, 2)),
    # MX codes: e4m3 or e4m3 by e2m1, e2m1, and e2m1 with coarse scales, which needs two sets again.
    ("mx_e4m3", _BLACKWELL): (Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 4, 4)),
    ("mx_e4m3", _RTX): (Tile(128, 128, 128, 8, 2), Tile(16, 64, 128, 4, 3)),
    ("mx_e4m3", _CDNA4): (Tile(256, 128, 128, 8, 2), Tile(16, 64, 256, 4, 2)),
    ("mx_e2m1", _BLACKWELL): (Tile(128, 256, 256, 8, 3), Tile(128, 128, 256, 4, 4)),
    ("mx_e2m1", _RTX): (Tile(128, 128, 128, 8, 3), Tile(16, 64, 256, 4, 3)),
    ("mx_e2m1", _CDNA4): (Tile(256, 128, 256, 8, 2), Tile(16, 64, 256, 4, 2)),
    ("mx_coarse", _BLACKWELL): (Tile(128, 64, 256, 8, 3),),
    ("mx_coarse", _RTX): (Tile(128, 64, 128, 8, 3), Tile(16, 64, 256, 4, 3)),
    ("mx_coarse", _CDNA4): (Tile(128, 128, 256, 8, 2), Tile(16, 64, 256, 4, 2)),
    # BF16 activations by codes that become BF16, and the same with scales that change along K. On
    # sm_100 and sm_120 that is for what the options have lowered for GPUs before them.
    ("decoded", _BLACKWELL): (Tile(128, 128, 64, 8, 3), Tile(64, 64, 128, 4, 3)),
    ("decoded", _AMPERE): (Tile(128, 128, 64, 8, 3), Tile(16, 64, 128, 4, 3)),
    ("decoded", _ADA + _RTX): (Tile(128, 128, 32, 8, 4), Tile(16, 64, 128, 4, 3)),
    ("decoded", _HOPPER): (
        Tile(1, 16, 512, 4, 1),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(64, 32, 128, 4, 4),
    ),
    ("decoded", _CDNA3): (Tile(128, 128, 64, 8, 2), Tile(16, 64, 64, 4, 2)),
    ("decoded", _CDNA2_RDNA): (Tile(128, 128, 32, 8, 2), Tile(16, 64, 64, 4, 2)),
    ("decoded_scaled", _BLACKWELL): (Tile(128, 64, 64, 8, 3), Tile(64, 64, 128, 4, 3)),
    ("decoded_scaled", _AMPERE): (Tile(128, 64, 64, 8, 3), Tile(16, 64, 128, 4, 3)),
    ("decoded_scaled", _ADA + _RTX): (Tile(128, 64, 32, 8, 4), Tile(16, 64, 128, 4, 3)),
    ("decoded_scaled", _HOPPER): (
        Tile(1, 16, 512, 4, 1),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(64, 32, 128, 4, 4),
    ),
    ("decoded_scaled", _CDNA3): (Tile(128, 128, 64, 8, 2), Tile(16, 64, 64, 4, 2)),
    ("decoded_scaled", _CDNA2_RDNA): (Tile(128, 64, 32, 8, 2), Tile(16, 64, 64, 4, 2)),
}  # fmt: skip

# What is tried beside those, where tiles are timed: other shapes of much the same size, and TMA.
_TRIED: dict[tuple[str, tuple[str, ...]], tuple[Tile, ...]] = {
    ("row_scaled", _AMPERE): (Tile(128, 256, 64, 8, 3), Tile(64, 128, 128, 4, 3)),
    ("row_scaled", _ADA + _RTX): (Tile(128, 64, 128, 4, 3), Tile(64, 128, 128, 4, 3)),
    ("row_scaled", _HOPPER): (
        Tile(64, 128, 128, 4, 5),
        Tile(256, 128, 128, 4, 3, persistent=True),
        Tile(128, 128, 128, 4, 4, persistent=True),
    ),
    ("row_scaled", _BLACKWELL): (Tile(128, 256, 64, 8, 3), Tile(64, 128, 128, 4, 4)),
    ("row_scaled", _CDNA3): (Tile(256, 128, 64, 8, 2),),
    ("row_scaled", _CDNA4): (Tile(128, 128, 128, 4, 2),),
    ("block_scaled", _HOPPER + _BLACKWELL): (Tile(128, 128, 128, 8, 3),),
    ("mx_e4m3", _BLACKWELL): (Tile(128, 128, 256, 8, 3),),
    ("mx_e2m1", _BLACKWELL): (Tile(128, 128, 512, 8, 3),),
    ("decoded", _HOPPER): (Tile(64, 128, 64, 4, 4), Tile(128, 64, 64, 4, 4)),
    ("decoded_scaled", _HOPPER): (Tile(64, 128, 64, 4, 4),),
}  # fmt: skip


def _by_architecture(
    rows: dict[tuple[str, tuple[str, ...]], tuple[Tile, ...]],
) -> dict[tuple[str, str], tuple[Tile, ...]]:
    return {(kernel, arch): tiles for (kernel, archs), tiles in rows.items() for arch in archs}


TILES = _by_architecture(_ROWS)
TRIED = _by_architecture(_TRIED)


def choose(kernel: str, arch: str, M: int, N: int, processors: int, tma: bool = True) -> Tile:
    """Return the largest tile that has no more rows than M needs and keeps every SM busy.

    Args:
        kernel: a key of `TILES`, with ``arch``.
        M, N: of the result.
        processors: how many SMs or compute units the device has.
        tma: whether TMA can load the operands, and the tile of a result fits beside them;
            persistent tiles need both.
    """
    known = [tile for tile in TILES[kernel, arch] if tma or not tile.persistent]
    # A tall matrix is not cut into tiles of 16 rows to have more of them.
    fitting = [tile for tile in known if min(M, 64) <= tile.block_m < 2 * M]
    fitting = fitting or [tile for tile in known if tile.block_m == known[-1].block_m]
    for tile in fitting:
        if tile.count(M, N) >= processors:
            return tile
    return fitting[-1]


def candidates(
    kernel: str, arch: str, M: int, N: int, processors: int, tma: bool = True
) -> tuple[Tile, ...]:
    """Return the tiles worth timing: what `choose` returns, first, and those that may do better.

    None of them has more rows than the first or M needs, or under a quarter of the first's size.
    """
    first = choose(kernel, arch, M, N, processors, tma)
    rows, size = max(2 * M - 1, first.block_m), first.block_m * first.block_n
    others = TILES[kernel, arch] + TRIED.get((kernel, arch), ())
    others = tuple(tile for tile in others if tma or not tile.persistent)
    fitting = [t for t in others if t.block_m <= rows and 4 * t.block_m * t.block_n >= size]
    return tuple(dict.fromkeys([first, *fitting]))
