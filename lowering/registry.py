"""(method, target) -> kernel. Adding a device is adding a folder with a ``KERNELS`` tuple."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.schemes import Scheme
from omniq_compile.lowering.target import ARCHITECTURES, Target


@dataclass(frozen=True)
class Problem:
    """One GEMM as a kernel sees it: a ``[..., K]`` times b ``[..., N, K]``.

    ``a_rank`` and ``b_rank`` count dimensions. b of rank 2 is one matrix for every row of a, and M
    counts them all; a higher rank is a batch of matrices, and M is of one. M may be symbolic, and
    between two activations K and N too: a plain comparison of one adds a guard to the graph.
    ``dtype`` is that of the GEMM's result.
    ``b_is_weight`` says that b comes as its format stores it, and not from the kernel's own
    ``quantize``.
    """

    M: Any
    K: Any
    N: Any
    a_rank: int
    b_rank: int
    dtype: torch.dtype
    b_is_weight: bool = True


def as_stored(parts: Parts) -> Parts:
    """Return a weight's parts as they are: the arrangement of most kernels."""
    return parts


def start_nothing(problem: Problem) -> None:
    """Begin nothing: what most kernels need for a first call."""


@dataclass(frozen=True)
class Kernel:
    """What one (method, target) lowers to.

    ``quantize``, ``arrange`` and ``gemm`` are written in operations that a compiler traces through.
    What ``quantize`` returns is between it and ``gemm``: an emulated kernel may decode at once.

    Attributes:
        name: device, operand type and how it multiplies, such as ``cpu_s8_int_mm``.
        native: True when the hardware multiplies in the method's own precision.
        about: what it does, and for an emulated kernel why.
        quantize: ``(x [..., K], format)`` -> what ``gemm`` takes for an activation.
        gemm: ``(a, b, bias, problem, scheme)`` -> ``[..., M, N]``, where b are a weight's parts
            from ``arrange``, or what ``quantize`` returned for another activation.
        refuse: ``(problem, scheme)`` -> why this kernel cannot take it, or None.
        decodes_whole: whether ``gemm`` holds a whole decoded weight for a while.
        arrange: a weight's parts as its format stores them -> as many parts, in the layout that
            ``gemm`` reads; each is the one that was given or has memory of its own. Done once for
            each weight, or in each call where that would hold a stored weight twice.
        takes_matrices: whether ``gemm`` views ``[..., M, K]`` as a matrix. Activations are then
            made one before they are quantized: Inductor stores what it computes once for each
            view.
        source: the file of `lowering` with the device code, where that is omniq's own.
        start: ``(problem)`` -> None; begins what a first call would wait for, such as a build.
        takes_unquantized: whether it also multiplies activations that stay as they are.
    """

    name: str
    method: str
    device: str
    archs: tuple[str, ...]
    native: bool
    about: str
    quantize: Callable[[torch.Tensor, str], Parts]
    gemm: Callable[[Parts, Parts, torch.Tensor | None, Problem, Scheme], torch.Tensor]
    refuse: Callable[[Problem, Scheme], str | None]
    decodes_whole: bool = False
    arrange: Callable[[Parts], Parts] = as_stored
    takes_matrices: bool = False
    source: str = ""
    start: Callable[[Problem], None] = start_nothing
    takes_unquantized: bool = False

    def read_source(self) -> str:
        """Return the text of ``source``."""
        return (Path(__file__).parent / self.source).read_text("utf-8")


def kernels_of(device: str) -> tuple[Kernel, ...]:
    """Return every kernel of a device, in order of preference."""
    module = importlib.import_module(f"omniq_compile.lowering.{device}")
    kernels: tuple[Kernel, ...] = module.KERNELS
    return kernels


def candidates(method: str, target: Target) -> list[Kernel]:
    """Return the kernels that can run ``method`` on ``target``, the preferred first."""
    return [k for k in kernels_of(target.device) if k.method == method and target.arch in k.archs]


def choose(scheme: Scheme, target: Target, problem: Problem) -> tuple[Kernel | None, str]:
    """Return the first kernel that takes the problem, with the reasons of those that refused."""
    rows = candidates(scheme.method, target)
    if scheme.weight_only:
        weight_only = importlib.import_module("omniq_compile.lowering.weight_only")
        rows = [kernel for kernel in rows if kernel.takes_unquantized]
        rows.append(weight_only.row(target.device, scheme.method))
    refusals: list[str] = []
    for kernel in rows:
        refusal = kernel.refuse(problem, scheme)
        if refusal is None:
            return kernel, "; ".join(refusals)
        refusals.append(f"{kernel.name}: {refusal}")
    return None, "; ".join(refusals) or f"no {scheme.method} kernel for {target}"


def table() -> list[tuple[Target, Kernel]]:
    """Return every (target, kernel) pair, for printing."""
    targets = [Target(device, arch) for device, archs in ARCHITECTURES.items() for arch in archs]
    return [(t, k) for t in targets for k in kernels_of(t.device) if t.arch in k.archs]
