"""From operands to a launch: a printable record of what runs, and the call that runs it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

# Private: what AOTAutograd traces. Checked on torch 2.11 to 2.15.
from torch._subclasses.functional_tensor import FunctionalTensor

from omniq_compile.lowering.errors import OmniqError
from omniq_compile.lowering.formats import mx as mx_blocks
from omniq_compile.lowering.formats.mxfp4_dualscale import RUN
from omniq_compile.lowering.symbolic_sizes import traced_size
from omniq_compile.lowering.target import detect
from omniq_compile.lowering.triton_kernels.tiles import Tile, candidates, choose, count

# Bytes that a row of an operand is a multiple of, where TMA loads it (CUDA driver API,
# cuTensorMapEncodeTiled, "globalStrides").
TMA_ALIGNMENT = 16


@dataclass(frozen=True)
class Device:
    """Where a kernel runs: its architecture, and how many SMs or compute units it has."""

    arch: str
    processors: int


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the file and the function of its device code.
        tiles: of the result: one, or those that Inductor is to choose from.
        arguments: tensors, sizes or None, by the function's parameters; M may be symbolic.
        constants: its compile-time parameters, but for those of a tile.
        device: where it runs.
    """

    kernel: str
    tiles: tuple[Tile, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    device: Device

    def programs(self, constants: Mapping[str, Any]) -> int:
        """Return how many programs compute the result, by the parameters of its tile."""
        sizes = self.arguments["M"], self.arguments["N"]
        tiles = count(*sizes, constants["BLOCK_M"], constants["BLOCK_N"])
        if not constants.get("PERSISTENT"):
            return tiles
        return torch.sym_min(tiles, self.device.processors)  # type: ignore[no-any-return]


def function(kernel: str) -> Any:
    """Return a kernel's device code, a function of ``triton.jit``.

    Raises:
        OmniqError: Triton is not installed.
    """
    try:
        module = importlib.import_module(f"omniq_compile.lowering.triton_kernels.{kernel}")
    except ImportError as error:
        raise OmniqError(
            f"kernel {kernel!r} needs Triton, and this Python has none ({error}). Install the "
            "version that torch asks for: pip install 'omniq-compile[triton]'."
        ) from error
    return getattr(module, kernel)


def run(launch: Launch) -> None:
    """Launch on the current stream of the device that the operands are on.

    While AOTAutograd traces, the launch becomes a node, which Inductor compiles and launches. Of
    several tiles it times each in the first call, for each M, N and K, and keeps the fastest.
    """
    K = launch.arguments["K"]
    arguments = launch.arguments | launch.constants
    if isinstance(launch.arguments["out_ptr"], FunctionalTensor):
        kernel = torch.library.wrap_triton(_configured(launch.kernel, launch.tiles, K))
        kernel[lambda meta: (launch.programs(meta),)](**arguments)
        return
    tile = launch.tiles[0]
    arguments |= tile_constants(launch.kernel, tile, K)
    with torch.cuda.device_of(launch.arguments["out_ptr"]):
        if tile.persistent:
            _give_memory_to_descriptors()
        function(launch.kernel)[(launch.programs(arguments),)](
            **arguments, num_warps=tile.warps, num_stages=tile.stages
        )


def _give_memory_to_descriptors() -> None:
    """Let Triton allocate what TMA's descriptors are written to, as Inductor does for its launches.

    Triton asks for it in the thread that launches, on the current stream.
    """
    import triton

    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda")
    )


@cache
def _configured(kernel: str, tiles: tuple[Tile, ...], K: int) -> Any:
    """Return a kernel with its configurations, in the form that Inductor takes from users."""
    import triton

    configs = [
        triton.Config(tile_constants(kernel, tile, K), num_warps=tile.warps, num_stages=tile.stages)
        for tile in tiles
    ]
    return triton.autotune(configs, key=[])(function(kernel))


def tile_constants(kernel: str, tile: Tile, K: int) -> dict[str, Any]:
    """Return the compile-time parameters of a kernel that a tile decides."""
    constants = {
        "EVEN_K": K % tile.block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
    }
    if kernel == "row_scaled_gemm":
        constants["PERSISTENT"] = tile.persistent
    return constants


def times_tiles(out: Tensor) -> bool:
    """Return whether Inductor is to time tiles: it was told to, and traces this launch."""
    if not isinstance(out, FunctionalTensor):
        return False
    from torch._inductor import config

    return config.max_autotune or config.max_autotune_gemm


@cache
def device_of(device: torch.device) -> Device:
    """Return what a GPU of this machine is.

    Raises:
        OmniqError: it is not a GPU.
    """
    if device.type != "cuda":
        raise OmniqError(f"Triton kernels run on GPUs, and these operands are on {str(device)!r}.")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Device(detect(device).arch, processors)


def row_scaled(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor,
    fnuz: bool, device: Device,
) -> Launch:  # fmt: skip
    """Multiply int8 or e4m3 codes, a scale per row of both; see the operator of the name."""
    operands = {"a_ptr": a, "a_scale_ptr": a_scale, "b_ptr": b, "b_scale_ptr": b_scale}
    constants = {"INTEGER": a.dtype is torch.int8, "FNUZ": fnuz}
    return _launch("row_scaled", "row_scaled", operands, bias, out, a.shape[-1], constants, device)


def block_scaled(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor,
    a_columns: int, b_rows: int, b_columns: int, fnuz: bool, device: Device,
) -> Launch:  # fmt: skip
    """Multiply e4m3 codes with a scale per group and per block."""
    operands = {"a_ptr": a, "a_scale_ptr": a_scale, "b_ptr": b, "b_scale_ptr": b_scale}
    constants = {"A_COLUMNS": a_columns, "B_ROWS": b_rows, "B_COLUMNS": b_columns, "FNUZ": fnuz}
    step = gcd(a_columns, b_columns)
    K = a.shape[-1]
    return _launch("block_scaled", "block_scaled", operands, bias, out, K, constants, device, step)


def mx(
    a: list[Tensor], b: list[Tensor], bias: Tensor | None, out: Tensor, device: Device
) -> Launch:
    """Multiply MX operands: codes, e8m0 scales and, for both or none, coarse scales."""
    a_coarse, b_coarse = (parts[2] if len(parts) > 2 else None for parts in (a, b))
    assert (a_coarse is None) == (b_coarse is None)
    operands = {
        "a_ptr": a[0], "a_scale_ptr": a[1], "a_coarse_ptr": a_coarse,
        "b_ptr": b[0], "b_scale_ptr": b[1], "b_coarse_ptr": b_coarse,
    }  # fmt: skip
    constants = {"A_ELEMENT": element(a[0]), "B_ELEMENT": element(b[0]), "RUN": RUN}
    tiles = "coarse" if b_coarse is not None else "e2m1"
    if "e4m3" in (constants["A_ELEMENT"], constants["B_ELEMENT"]):
        tiles = "e4m3"
    K = a[1].shape[-1] * mx_blocks.BLOCK
    return _launch("mx", f"mx_{tiles}", operands, bias, out, K, constants, device)


def decoded(
    a: list[Tensor], b: Tensor, b_block: Tensor | None, b_scale: Tensor | None, bias: Tensor | None,
    out: Tensor, b_rows: int, columns: int, device: Device,
) -> Launch:  # fmt: skip
    """Multiply real activations, with scales or without, by codes that are decoded on the way."""
    operands = {
        "a_ptr": a[0], "a_scale_ptr": a[1] if len(a) > 1 else None,
        "b_ptr": b.view(torch.uint8) if b.dtype is torch.float8_e4m3fn else b,
        "b_block_ptr": b_block, "b_scale_ptr": b_scale,
    }  # fmt: skip
    constants = {"B_ELEMENT": element(b), "B_ROWS": b_rows, "COLUMNS": columns}
    K, tiles = a[0].shape[-1], "decoded_scaled" if columns else "decoded"
    return _launch("decoded", tiles, operands, bias, out, K, constants, device, columns)


def _without_turns(tile: Tile, K: int) -> Tile:
    """Return a tile whose warps take no turns at loading and multiplying where K is ragged.

    With four warps Triton before 3.8 has them do so on gfx942, and gets wrong sums where loads have
    a mask that changes along K (triton-lang/triton#10585).
    """
    return dataclasses.replace(tile, warps=8) if K % tile.block_k else tile


def element(codes: Tensor) -> str:
    """Name what a tensor holds: "e4m3", "e2m1" (two a byte), or "real"."""
    return {torch.float8_e4m3fn: "e4m3", torch.uint8: "e2m1"}.get(codes.dtype, "real")


def _launch(
    kernel: str,
    tiles: str,
    operands: dict[str, Any],
    bias: Tensor | None,
    out: Tensor,
    K: int,
    constants: dict[str, Any],
    device: Device,
    step: int = 0,
) -> Launch:
    """Choose from a row of `TILES`; ``step``, if any, is what a tile's block of K divides.

    A symbolic M keeps the tiles of the call that is traced. K may be an expression in symbols where
    it is read off an activation; the weight's is a number, which it equals.
    """
    N, K = out.shape[-1], int(K)
    M = out.numel() // N
    rows = traced_size(M)
    assert rows is not None
    # Of a float32 result a persistent tile and its operands are more than shared memory holds.
    tma = K % TMA_ALIGNMENT == 0 and out.element_size() <= 2
    sizes = tiles, device.arch, rows, N, device.processors, tma
    chosen = candidates(*sizes) if times_tiles(out) else (choose(*sizes),)
    fitted = (dataclasses.replace(tile, block_k=gcd(tile.block_k, step)) for tile in chosen)
    if kernel == "row_scaled" and device.arch == "gfx942":
        fitted = (_without_turns(tile, K) for tile in fitted)
    arguments = operands | {"bias_ptr": bias, "out_ptr": out, "M": M, "N": N, "K": K}
    return Launch(f"{kernel}_gemm", tuple(dict.fromkeys(fitted)), arguments, constants, device)
