"""QuantConfig: what a user may ask for, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from omniq_compile.lowering.errors import OptionError, unknown
from omniq_compile.lowering.schemes import METHODS, Scheme, get_scheme
from omniq_compile.lowering.target import Target

COMPILERS = ("inductor", "aot_eager", "eager")
ACTIVATION_SCHEMES = ("dynamic",)

# Narrower layers hold little of a transformer's work, and their quantize and epilogue loops weigh
# more beside the smaller GEMM. Chosen by that argument; a measured sweep is still owed.
MIN_FEATURES = 256


@dataclass(frozen=True)
class QuantConfig:
    """The checked options of one compile.

    Attributes:
        method: how weights and activations are quantized.
        ignored_layers: patterns of layers to keep in their own precision.
        activation_scheme: ``"dynamic"``: activation scales are computed in each call.
        min_features: the smallest K or N worth quantizing; 1 takes everything the kernels take.
        matmul: also quantize activation-times-activation products, per row of both operands.
        compiler: what compiles the rewritten graph.
        inductor: settings passed on to Inductor.
        target: the device to lower for; None means the model's own device.
    """

    method: str
    ignored_layers: tuple[str, ...] = ()
    activation_scheme: str = "dynamic"
    min_features: int = MIN_FEATURES
    matmul: bool = False
    compiler: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    target: Target | None = None

    @property
    def scheme(self) -> Scheme:
        """The formats that the method multiplies in."""
        return get_scheme(self.method)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | QuantConfig | None) -> QuantConfig:
        """Check a user's options.

        Raises:
            OptionError: an unknown option or value; the message lists the valid ones.
        """
        if isinstance(options, QuantConfig):
            return options
        if not isinstance(options, Mapping) or "method" not in options:
            raise OptionError(
                'omniq needs options={"method": ...}. Methods: ' + ", ".join(METHODS) + "."
            )
        valid = [f.name for f in fields(cls)]
        for name in options:
            if name not in valid:
                raise OptionError(unknown("option", name, valid))
        checked = {name: _CHECKS[name](value) for name, value in options.items()}
        return cls(**checked)


def _one_of(name: str, valid: tuple[str, ...]) -> Any:
    def check(value: Any) -> str:
        text = value.lower().replace("-", "_") if isinstance(value, str) else value
        if text not in valid:
            raise OptionError(unknown(name, value, valid))
        return str(text)

    return check


def _boolean(name: str) -> Any:
    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise OptionError(f"option {name!r} must be True or False, not {value!r}.")
        return value

    return check


def _min_features(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"option 'min_features' must be an integer of at least 1, not {value!r}.")
    return value


def _ignored_layers(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(v, str) and v for v in _iterate(value)):
        raise OptionError(
            f"option 'ignored_layers' must be a list of layer patterns, not {value!r}. "
            "Write for example ['img_mod', 're:.*attn.*']."
        )
    for pattern in value:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise OptionError(
                    f"ignored_layers pattern {pattern!r} is not a regular expression: {error}."
                ) from error
    return tuple(value)


def _iterate(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [None]


def _inductor(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(
            f"option 'inductor' must be a dict of Inductor settings, not {value!r}; "
            "torch._inductor.list_options() lists them."
        )
    return dict(value)


def _target(value: Any) -> Target | None:
    if value is None or isinstance(value, Target):
        return value
    if not isinstance(value, str):
        raise OptionError(f"option 'target' must be text such as 'cpu', not {value!r}.")
    return Target.parse(value)


_CHECKS: dict[str, Any] = {
    "method": _one_of("method", METHODS),
    "ignored_layers": _ignored_layers,
    "activation_scheme": _one_of("activation_scheme", ACTIVATION_SCHEMES),
    "min_features": _min_features,
    "matmul": _boolean("matmul"),
    "compiler": _one_of("compiler", COMPILERS),
    "inductor": _inductor,
    "target": _target,
}
