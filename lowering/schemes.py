"""Which formats a method multiplies in: one row a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from omniq_compile.lowering.errors import OptionError, unknown
from omniq_compile.lowering.formats import unquantized
from omniq_compile.lowering.formats.mxfp4 import name_suffix


@dataclass(frozen=True)
class Scheme:
    """The formats of one GEMM's operands; a product of two activations takes the first twice.

    Attributes:
        method: as a user spells it.
        activation, weight: names of formats; the first is ``"unquantized"`` where activations stay
            as they are.
    """

    method: str
    activation: str
    weight: str

    @property
    def weight_only(self) -> bool:
        """Whether activations stay as they are."""
        return self.activation == unquantized.FORMAT.name

    def __str__(self) -> str:
        same = self.activation == self.weight == self.method
        return self.method if same else f"{self.method} ({self.activation} x {self.weight})"


def _same(method: str) -> Callable[..., Scheme]:
    return lambda scale_alg, weight_block_size: Scheme(method, method, method)


def _fp8(scale_alg: int, weight_block_size: Sequence[int] | None) -> Scheme:
    if weight_block_size is None:
        return Scheme("fp8", "fp8", "fp8")
    rows, columns = weight_block_size
    # Activations in groups of 128 whatever the weight's block: what DeepSeek-V3 introduced, and
    # what block-wise hardware GEMMs take.
    return Scheme("fp8", "fp8_group_128", f"fp8_block_{rows}x{columns}")


def _mxfp4(method: str) -> Callable[..., Scheme]:
    def scheme(scale_alg: int, weight_block_size: Sequence[int] | None) -> Scheme:
        name = method + name_suffix(scale_alg)
        return Scheme(method, name, name)

    return scheme


_ROWS: dict[str, Callable[..., Scheme]] = {
    "int8": _same("int8"),
    "fp8": _fp8,
    "mxfp8": _same("mxfp8"),
    "mxfp4": _mxfp4("mxfp4"),
    "mxfp4_dualscale": _mxfp4("mxfp4_dualscale"),
}

METHODS = tuple(_ROWS)


def get_scheme(
    method: str,
    scale_alg: int = 0,
    weight_block_size: Sequence[int] | None = None,
    activation_scheme: str = "dynamic",
) -> Scheme:
    """Return the formats that a method multiplies in.

    Args:
        scale_alg: how mxfp4 chooses its block scale: 0 (OCP) or 2 (UOS).
        weight_block_size: ``(rows, columns)`` that share a scale, fp8 only.
        activation_scheme: ``"dynamic"``, or ``"none"`` for weights alone.

    Raises:
        OptionError: no such method, or no such ``scale_alg`` of mxfp4.
    """
    if method not in _ROWS:
        raise OptionError(unknown("method", method, METHODS))
    scheme = _ROWS[method](scale_alg, weight_block_size)
    if activation_scheme == "none":
        return replace(scheme, activation=unquantized.FORMAT.name)
    return scheme


def w4a8(scheme: Scheme) -> Scheme:
    """Return mxfp4 with the same weights and mxfp8 activations; no other method has kernels."""
    assert scheme.method == "mxfp4", scheme
    return Scheme(scheme.method, "mxfp8", scheme.weight)
