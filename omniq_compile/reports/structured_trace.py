"""Puts the graphs of a compile into PyTorch's structured trace, where ``tlparse`` shows them.

The one place that uses `torch._logging._internal.trace_structured`, which is private. Checked on
torch 2.11 to 2.15: its "artifact" events with a name and the encoding "string", and the handlers
of the logger `torch.__trace`.
"""

from __future__ import annotations

import logging

import torch

from omniq_compile.passes.context import Context
from omniq_compile.passes.printing.program import program


def wanted() -> bool:
    """Say whether somebody reads the trace, as with ``TORCH_TRACE`` set to a folder."""
    return bool(logging.getLogger("torch.__trace").handlers)


def publish(context: Context, summary: str) -> None:
    """Write one artifact a stage, ``omniq_quantized`` and so on, and ``omniq_summary``."""
    _artifact("omniq_summary", summary)
    for stage, gm in (context.stages or {}).items():
        _artifact(f"omniq_{stage}", program(gm, f"{stage}, {context.target}"))


def _artifact(name: str, text: str) -> None:
    torch._logging._internal.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: text,
    )
