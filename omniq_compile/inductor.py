"""The call of Inductor, and what it is told about GEMMs first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from omniq_compile.lowering.triton_kernels import launch
from omniq_compile.passes.config import QuantConfig


def settings_of(config: QuantConfig, mode: str | None = None) -> dict[str, Any]:
    """Return the settings of Inductor that a configuration asks for, by its mode and by name.

    Args:
        config: its ``mode`` and ``inductor``.
        mode: in place of the first.
    """
    return {**torch._inductor.list_mode_options(mode or config.mode), **config.inductor}


def compile(
    gm: fx.GraphModule, inputs: Sequence[Any], settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compile a graph with `torch._inductor.compile`.

    Args:
        gm: a graph of torch's operators and omniq's.
        inputs: one for each placeholder, real or fake.
        settings: of Inductor, see `torch._inductor.list_options`.
    """
    _store_operands_once()
    # A compiled graph has launches of omniq's kernels in it, and its key in PyTorch's caches, of
    # which the user's tag is a part, has only the names of their operators.
    config: Any = torch.compiler.config
    tag = f"{config.cache_key_tag} omniq {_own_kernels()}"
    with config.patch(cache_key_tag=tag):
        compiled: Callable[..., Any] = torch._inductor.compile(
            gm, list(inputs), options=dict(settings)
        )
    return compiled


@cache
def _own_kernels() -> str:
    """Return a digest of the files that make launches: device code, tiles and their choice."""
    digest = hashlib.sha256()
    for file in sorted(Path(launch.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _store_operands_once() -> None:
    """Tell Inductor that GEMMs read their operands from memory, as it knows of `aten.mm`.

    Where one activation feeds three GEMMs, it would otherwise compute and store it three times on
    a GPU. Private, checked on torch 2.11 to 2.13, whose function for this takes no Triton launches
    before 2.13; other graphs of the process may profit too.
    """
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
    from torch._inductor.lowering import needs_realized_inputs

    aten, known = torch.ops.aten, needs_realized_inputs
    known.update([aten._scaled_mm.default, aten._int_mm.default])
    known.add(triton_kernel_wrapper_mutation)  # type: ignore[arg-type]
