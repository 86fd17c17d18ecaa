"""The (method, target) table, and what this machine has."""

from __future__ import annotations

from dataclasses import dataclass

from omniq_compile.lowering import registry
from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.target import ARCHITECTURES, Target, present


@dataclass(frozen=True)
class KernelRow:
    """One kernel on one target.

    Attributes:
        native: the hardware multiplies in the method's own precision.
        here: this machine is that target.
        preferred: the first that is tried there for the method.
    """

    method: str
    target: str
    kernel: str
    native: bool
    here: bool
    preferred: bool
    about: str


def kernels() -> list[KernelRow]:
    """Return every kernel of every target, the preferred first."""
    seen: set[tuple[str, str]] = set()
    rows = []
    here = {_present(device) for device in ARCHITECTURES}
    for target, kernel in registry.table():
        cell = (kernel.method, str(target))
        rows.append(
            KernelRow(
                method=kernel.method,
                target=str(target),
                kernel=kernel.name,
                native=kernel.native,
                here=target in here,
                preferred=cell not in seen,
                about=kernel.about,
            )
        )
        seen.add(cell)
    return rows


def _present(device: str) -> Target | None:
    try:
        return present(device)
    except OptionError:  # a GPU from before those that have kernels
        return None
