"""How near a variant's GEMMs come to the device's measured peak, each timed on its own."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from omniq_compile.benchmark.linears import linear_calls
from omniq_compile.benchmark.machine import captured, time_calls
from omniq_compile.benchmark.suites import Suite
from omniq_compile.compiling import inductor
from omniq_compile.lowering import registry
from omniq_compile.lowering.formats import get_format
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.target import detect
from omniq_compile.passes.config import QuantConfig

# (M, N, K) of a linear.
Shape = tuple[int, int, int]

# The peak that a native kernel of a method is measured by; an emulated one multiplies in BF16.
PEAK_OF = {"int8": "int8", "fp8": "fp8", "mxfp8": "fp8", "mxfp4": "fp8", "mxfp4_dualscale": "fp8"}

# Linears with less of a block's arithmetic than this are not timed on their own.
LEAST_PART = 0.01
REPEATS = 5


@dataclass(frozen=True)
class Peak:
    """The rate of one large square GEMM in operations a second, or why there is none."""

    dtype: str
    rate: float | None
    error: str | None = None


@dataclass(frozen=True)
class GemmRate:
    """The GEMMs of one block in one variant, without what is around them.

    Attributes:
        kernels: the kernels that ran them.
        rate: 2 M N K operations by the seconds they took, over all of them.
        peak: the dtype of the peak that ``share`` is a part of.
    """

    kernels: tuple[str, ...]
    rate: float
    peak: str
    share: float | None


def linear_shapes(model: nn.Module, call: Callable[[], Any]) -> Counter[Shape]:
    """Count the shapes of the linears that a call runs, those that matter for its time."""
    shapes: Counter[Shape] = Counter(
        (rows, linear.out_features, linear.in_features)
        for linear, rows in linear_calls(model, call)
    )
    total = _operations(shapes)
    return Counter({s: n for s, n in shapes.items() if _operations({s: n}) >= LEAST_PART * total})


def measure_peaks(suite: Suite) -> list[Peak]:
    """Time a large square GEMM in each precision that tensor cores have."""
    size, device = suite.peak_size, torch.device(suite.device)
    real = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    one = torch.ones((), device=device)

    def fp8() -> Callable[[], Any]:
        codes = real.clamp(-2, 2).to(torch.float8_e4m3fn)
        return lambda: torch._scaled_mm(
            codes, codes.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def int8() -> Callable[[], Any]:
        codes = (real * 30).to(torch.int8)
        return lambda: torch._int_mm(codes, codes.t())

    def bfloat16() -> Callable[[], Any]:
        return lambda: real @ real.t()

    peaks = []
    for dtype, make in {"bfloat16": bfloat16, "fp8": fp8, "int8": int8}.items():
        try:
            seconds = _seconds(make(), suite)
        except (RuntimeError, NotImplementedError) as error:
            peaks.append(Peak(dtype, None, f"{type(error).__name__}: {error}"))
        else:
            peaks.append(Peak(dtype, 2 * size**3 / seconds))
    return peaks


def gemm_rate(
    shapes: Counter[Shape],
    options: dict[str, Any] | None,
    suite: Suite,
    peaks: list[Peak],
    compiler: str = "inductor",
) -> GemmRate:
    """Time the GEMMs of a block with omniq's ``options``, or in BF16 where there are none.

    Raises:
        RuntimeError: the device or the compiler refuses one of them.
    """
    seconds, kernels, kinds = 0.0, dict[str, None](), set[str]()
    for (M, N, K), count in shapes.items():
        kernel, kind, call = _gemm(M, N, K, options, suite.device, compiler)
        kernels[kernel] = None
        kinds.add(kind)
        seconds += count * _seconds(call, suite)
    # A block whose GEMMs are not all of one kind is measured by the slower peak.
    peak = "bfloat16" if "bfloat16" in kinds else kinds.pop()
    top = next(p.rate for p in peaks if p.dtype == peak)
    rate = _operations(shapes) / seconds
    return GemmRate(tuple(kernels), rate, peak, rate / top if top else None)


def compile_gemms(shapes: Iterable[Shape], options: dict[str, Any], device: str) -> None:
    """Call each GEMM that `gemm_rate` would time, for Inductor's cache."""
    for M, N, K in shapes:
        _gemm(M, N, K, options, device, "inductor")[-1]()


def _gemm(
    M: int, N: int, K: int, options: dict[str, Any] | None, device: str, compiler: str
) -> tuple[str, str, Callable[[], Any]]:
    """Return a GEMM's kernel, the dtype of its peak, and a call of it."""
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    w = torch.randn(N, K, device=device, dtype=torch.bfloat16)
    if options is None:
        return "linear", "bfloat16", lambda: F.linear(x, w)
    config = QuantConfig.from_options(options)
    scheme, problem = config.scheme, Problem(M, K, N, 2, 2, torch.bfloat16)
    kernel, why = registry.choose(scheme, detect(device), problem)
    if kernel is None:
        raise RuntimeError(f"no kernel takes {problem}: {why}")
    a = kernel.quantize(x, scheme.activation)
    b = kernel.arrange(get_format(scheme.weight).quantize(w))
    parts = [part.contiguous() for part in (*a, *b)]

    def multiply(*parts: torch.Tensor) -> torch.Tensor:
        return kernel.gemm(parts[: len(a)], parts[len(a) :], None, problem, scheme)

    graph = make_fx(multiply)(*parts)
    settings = inductor.settings_of(config)
    call = inductor.compile(graph, parts, settings) if compiler == "inductor" else graph
    kind = PEAK_OF[config.method] if kernel.native else "bfloat16"
    return kernel.name, kind, lambda: call(*parts)


def _seconds(call: Callable[[], Any], suite: Suite) -> float:
    """Return the seconds of a call, the median of several times many in a row."""

    def calls() -> None:
        for _ in range(suite.gemm_calls):
            call()

    device = torch.device(suite.device)
    # A GEMM can be shorter than the host takes to launch it.
    run = captured(calls) if device.type == "cuda" else calls
    seconds = []
    for _ in range(REPEATS):
        run()  # on a GPU the next one, which is timed, is queued behind it
        seconds.append(time_calls(run, device).seconds)
    return statistics.median(seconds) / suite.gemm_calls


def _operations(shapes: Any) -> int:
    return sum(2 * M * N * K * count for (M, N, K), count in shapes.items())
