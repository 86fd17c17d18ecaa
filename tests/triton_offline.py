"""Compiles launches of the Triton GEMMs for GPUs that are not there, in a process of its own.

What is compiled is what `launch` makes of operands on the meta device. The report says what the
tests ask: which matrix instructions there are, what was spilled, and the shared memory it takes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from omniq_compile.lowering.formats import block_size, get_format
from omniq_compile.lowering.triton_kernels import launch
from omniq_compile.lowering.triton_kernels.launch import Device, Launch

N, K = 3072, 3072
# M for the largest tile, for the most rows that are decoded in registers, for the smallest tile.
LARGE, ONE_TILE, SMALL = 4096, 128, 9
# Rows that have a tile of their own, without tensor cores, and where.
ONE_ROW, ONE_ROW_ARCHS = 1, ("sm_90",)
PROCESSORS = 132

CUDA = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942", "gfx950", "gfx90a", "gfx1100", "gfx1201")
FP8 = ("sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1201")
NO_FP8 = ("sm_80", "gfx90a", "gfx1100")
SCALED = ("sm_100", "sm_120", "gfx950")
UNSCALED = ("sm_80", "sm_89", "sm_90", *(arch for arch in AMD if arch != "gfx950"))

# (formats of a and b, architectures): an activation "real" is BF16, a weight "real" was decoded by
# the graph.
LARGE_AND_SMALL = (
    ("int8", "int8", (*CUDA, *AMD)),
    ("fp8", "fp8", FP8),
    ("fp8_group_128", "fp8_block_128x128", FP8),
    ("mxfp8", "mxfp8", SCALED),
    ("mxfp4", "mxfp4", SCALED),
    ("mxfp8", "mxfp4", ("sm_100", "gfx950")),
    ("mxfp4_dualscale", "mxfp4_dualscale", SCALED),
)
DECODED = (
    ("real", "mxfp8", UNSCALED),
    ("real", "mxfp4", (*UNSCALED, "sm_120")),
    ("real", "mxfp4_dualscale", UNSCALED),
    ("real", "fp8", NO_FP8),
    ("real", "fp8_block_128x128", NO_FP8),
)
# What later GPUs are given where the options name the target of earlier ones.
FOR_EARLIER = (
    ("real", "mxfp8", ("sm_100",)),
    ("real", "mxfp4", ("sm_100",)),
    ("real", "mxfp4_dualscale", ("sm_100", "sm_120")),
    ("real", "fp8", ("sm_100",)),
    ("real", "fp8_block_128x128", ("sm_100", "sm_120")),
)
ONE_ROW_FORMATS = (("int8", "int8"), ("fp8", "fp8"), *((a, b) for a, b, _ in DECODED[:3]))

POINTERS = {
    torch.int8: "*i8", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv",
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
}  # fmt: skip
MATRIX = re.compile(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]+|v_(?:mfma|wmma)_\w+")


@dataclass(frozen=True)
class Case:
    """A product for one architecture.

    Attributes:
        a, b: formats.
        ragged: K is no multiple of the tile's.
        by_graph: b was decoded before.
        tile: which of those that Inductor times; the first is chosen where it times none.
    """

    a: str
    b: str
    arch: str
    M: int
    ragged: bool = False
    by_graph: bool = False
    tile: int = 0

    def __str__(self) -> str:
        marks = ("-ragged" if self.ragged else "") + ("-by_graph" if self.by_graph else "")
        marks += f"-tile{self.tile}" if self.tile else ""
        return f"{self.a}-{self.b}-{self.arch}-M{self.M}{marks}"


def cases() -> Iterator[Case]:
    """Name what the rows of each architecture launch."""
    for a, b, archs in LARGE_AND_SMALL:
        yield from (Case(a, b, arch, SMALL) for arch in archs)
        # On NVIDIA cuBLAS multiplies fp8 rows where it can, and int8 has the same tiles.
        rare = CUDA if b == "fp8" else ()
        yield from (c for arch in archs for c in timed(Case(a, b, arch, LARGE), arch not in rare))
    for a, b, archs in DECODED:
        yield from (Case(a, b, arch, SMALL) for arch in archs)
        yield from (case for arch in archs for case in timed(Case(a, b, arch, ONE_TILE)))
    for a, b, archs in FOR_EARLIER:
        yield from (Case(a, b, arch, M) for arch in archs for M in (SMALL, ONE_TILE))
    for a, b in ONE_ROW_FORMATS:
        yield from (Case(a, b, arch, ONE_ROW) for arch in ONE_ROW_ARCHS)
    for arch in UNSCALED:
        yield Case("real", "mxfp4_dualscale", arch, LARGE, by_graph=True)
    yield Case("real", "fp8", "sm_80", LARGE, by_graph=True)
    yield Case("int8", "int8", "sm_90", LARGE, ragged=True)
    yield Case("int8", "int8", "gfx942", LARGE, ragged=True)
    yield Case("fp8_group_128", "fp8_block_128x128", "gfx942", LARGE, ragged=True)
    yield Case("mxfp8", "mxfp8", "sm_100", LARGE, ragged=True)


def timed(case: Case, others: bool = True) -> Iterator[Case]:
    """Name a case with each tile that Inductor times, or with the first alone."""
    count = len(make_timed(case).tiles) if others else 1
    yield from (dataclasses.replace(case, tile=tile) for tile in range(count))


def make(case: Case) -> Launch:
    """Launch as the operators do, on operands without values."""
    record = make_timed(case)
    return dataclasses.replace(record, tiles=record.tiles[case.tile :][:1])


def make_timed(case: Case) -> Launch:
    """Launch as Inductor does where it times tiles."""
    with mock.patch.object(launch, "times_tiles", return_value=True):
        return _make(case)


def _make(case: Case) -> Launch:
    k = K + 32 if case.ragged else K
    with torch.device("meta"):
        out = torch.empty(case.M, N, dtype=torch.bfloat16)
        b = list(get_format(case.b).allocate(torch.empty(N, k)))
        real = case.a == "real"
        x = torch.empty(case.M, k, dtype=torch.bfloat16)
        a = [x] if real else list(get_format(case.a).allocate(x))
        if real and case.b == "mxfp4_dualscale":
            a.append(torch.empty(case.M, k // 512))
    where: dict[str, Any] = {"bias": out[0], "out": out, "device": Device(case.arch, PROCESSORS)}
    if real:
        return _decoded(case, a, b, where)
    if case.b.startswith("mx"):
        return launch.mx(a=a, b=b, **where)
    parts: dict[str, Any] = {"a": a[0], "a_scale": a[1], "b": b[0], "b_scale": b[1]} | where
    parts["fnuz"] = case.arch == "gfx942" and case.b != "int8"
    block = block_size(case.b)
    if block is None:
        return launch.row_scaled(**parts)
    return launch.block_scaled(**parts, a_columns=128, b_rows=block[0], b_columns=block[1])


def _decoded(case: Case, a: list[Any], b: list[Any], where: dict[str, Any]) -> Launch:
    codes, *scales = b
    if case.by_graph:
        codes = torch.empty(N, K, dtype=torch.bfloat16, device="meta")
    b_rows, columns = block_size(case.b) or (1, 512 if "dualscale" in case.b else 0)
    mx = case.b.startswith("mx")
    block = scales[0] if mx and not case.by_graph else None
    scale = scales[-1] if not mx or columns else None
    operands = {"a": a, "b": codes, "b_block": block, "b_scale": scale}
    return launch.decoded(**operands, b_rows=b_rows, columns=columns, **where)


def compile_launch(record: Launch, arch: str) -> dict[str, Any]:
    """Compile for ``arch`` what a launch would compile there; returns the report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = launch.function(record.kernel)
    (tile,) = record.tiles
    fixed = record.constants | launch.tile_constants(record.kernel, tile, record.arguments["K"])
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(function.arg_names):
        value = fixed.get(name, record.arguments.get(name))
        if name in fixed or value is None:
            signature[name], constants[(position,)] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[name] = POINTERS[value.dtype] if tensor else "i32"
        if tensor or (name not in function.do_not_specialize and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options)
    code = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    return {
        "tile": dataclasses.asdict(tile),
        "tma": "cp.async.bulk.tensor" in code,
        "warp_specialized": "setmaxnreg" in code,
        "instructions": sorted(set(MATRIX.findall(code))),
        "takes_turns": "s_setprio" in code,
        "shared": compiled.metadata.shared,
        "spilled": _spilled(compiled),
        "flushes_denormals": bool(re.search(r"(mul|fma)\S*\.ftz|denorm_mode_32 [012]\b", code)),
    }


def _spilled(compiled: Any) -> int:
    """Return bytes of the stack and of local memory, which registers are spilled to.

    Of a cubin these are read by NVIDIA's ``cuobjdump``, which Triton brings. An AMD kernel states
    its own, in the metadata that the loader reads.
    """
    if "amdgcn" in compiled.asm:
        names = r"\.(?:private_segment_fixed_size|sgpr_spill_count|vgpr_spill_count): +(\d+)"
        found = re.findall(names, compiled.asm["amdgcn"])
    else:
        import triton

        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(tools / "cuobjdump"), "-res-usage", file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"(?:STACK|LOCAL):(\d+)", said)
    assert found, "no word of spills"
    return sum(map(int, found))


def main(names: list[str]) -> None:
    """Print a report, a line of JSON, of each case that is named."""
    for case in (case for case in cases() if str(case) in names):
        try:
            report = compile_launch(make(case), case.arch)
        except Exception as error:  # reported, and fails the case's test
            report = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps([str(case), report]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
