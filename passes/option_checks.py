"""One check an option: a user's value in, the clean value out, or an error that says what to do.

Adding an option is adding a field to `QuantConfig` and a row to `CHECKS`.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch

from omniq_compile.lowering.errors import OptionError, hint, unknown
from omniq_compile.lowering.schemes import METHODS
from omniq_compile.lowering.target import Target

COMPILERS = ("inductor", "aot_eager", "eager")
ACTIVATION_SCHEMES = ("dynamic", "none")
# As torch.compile documents them.
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# Options that only some methods have.
METHODS_OF: dict[str, tuple[str, ...]] = {
    "mxfp4_scale_alg": ("mxfp4", "mxfp4_dualscale"),
    "weight_block_size": ("fp8",),
    "num_bf16_fallback_layers": ("mxfp4_dualscale",),
    "w4a8_fallback_layers": ("mxfp4",),
    "w4a8_fallback_steps": ("mxfp4",),
}


MOST_IN_A_BLOCK = 2**31 - 1  # kernels count in int32


def _one_of(name: str, valid: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        text = value.lower().replace("-", "_") if isinstance(value, str) else None
        if text not in valid:
            raise OptionError(unknown(name, value, valid))
        return text

    return check


def _boolean(name: str) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise OptionError(f"option {name!r} must be True or False, not {value!r}.")
        return value

    return check


def _is_integer(value: Any, least: int) -> bool:
    # NumPy's integers are some, too.
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _integer(name: str, least: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if not _is_integer(value, least):
            raise OptionError(
                f"option {name!r} must be an integer of at least {least}, not {value!r}."
            )
        return int(value)

    return check


def _layers(name: str) -> Callable[[Any], tuple[str, ...]]:
    def check(value: Any) -> tuple[str, ...]:
        if isinstance(value, str) or not all(isinstance(v, str) and v for v in _iterate(value)):
            raise OptionError(
                f"option {name!r} must be a list of layer patterns, not {value!r}. "
                "Write for example ['img_mod', 're:.*attn.*']."
            )
        for pattern in value:
            check_pattern(name, pattern)
        return tuple(value)

    return check


def check_pattern(name: str, pattern: str) -> None:
    """Check a layer pattern that was given as an option, or argument, of some name.

    Raises:
        OptionError: it is ``re:`` and no regular expression.
    """
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise OptionError(
                f"{name} pattern {pattern!r} is not a regular expression: {error}."
            ) from error


def _iterate(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple, set, frozenset, range)) else [None]


def _inductor(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(
            f"option 'inductor' must be a dict of Inductor settings, not {value!r}; "
            "torch._inductor.list_options() lists them."
        )
    # Inductor is slow to import, and most configurations leave its settings alone.
    known = torch._inductor.list_options() if value else []
    for name, setting in value.items():
        if name not in known:
            raise OptionError(
                f"option 'inductor' has {name!r}, which is no setting of Inductor."
                f"{hint(name, known)} torch._inductor.list_options() lists them."
            )
        # As torch.compile checks its own options, private, on torch 2.11 to 2.15.
        kind = torch._inductor.config.get_type(name)  # type: ignore[attr-defined]
        if typing.get_origin(kind) is None and not isinstance(setting, kind):
            raise OptionError(
                f"option 'inductor' has {name!r}: {setting!r}, and Inductor takes a "
                f"{kind.__name__}."
            )
    return dict(value)


def _mode(value: Any) -> str:
    if not isinstance(value, str) or value not in MODES:
        raise OptionError(unknown("mode", value, MODES))
    return str(value)


def _target(value: Any) -> Target | None:
    if value is None or isinstance(value, Target):
        return value
    if not isinstance(value, str):
        raise OptionError(f"option 'target' must be text such as 'cpu', not {value!r}.")
    return Target.parse(value)


def _scale_alg(value: Any) -> int:
    if not _is_integer(value, 0) or int(value) not in (0, 2):
        raise OptionError(
            f"option 'mxfp4_scale_alg' must be 0 (OCP Microscaling v1.0) or 2 (UOS), not {value!r}."
        )
    return int(value)


def _block_size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = list(value) if isinstance(value, (list, tuple)) else []
    in_range = all(_is_integer(size, 1) and size <= MOST_IN_A_BLOCK for size in sizes)
    if len(sizes) != 2 or not in_range:
        raise OptionError(
            "option 'weight_block_size' must be two integers from 1 to 2**31 - 1, rows (N) and "
            f"columns (K), such as [128, 128], not {value!r}."
        )
    return int(sizes[0]), int(sizes[1])


def _steps(value: Any) -> tuple[int, ...]:
    if not all(_is_integer(step, 0) for step in _iterate(value)):
        raise OptionError(
            "option 'w4a8_fallback_steps' must be a list of zero-based denoising steps, such as "
            f"[0, 1], not {value!r}."
        )
    return tuple(sorted(set(map(int, value))))


def unknown_option(name: Any) -> str:
    """Word the error for an option that there is not, which may be one of ``torch.compile``'s."""
    if name == "backend":
        return "'backend' is an argument of torch.compile, where omniq is given. Leave it out here."
    if name in inspect.signature(torch.compile).parameters:
        return (
            f"{name!r} is an argument of torch.compile, and no option of omniq. Give it beside the "
            f"options: torch.compile(model, backend='omniq', {name}=..., options=...)."
        )
    if name in torch._inductor.list_options():
        return (
            f"{name!r} is a setting of Inductor, and no option of omniq. Give it inside the option "
            f"'inductor': {{'inductor': {{{name!r}: ...}}}}."
        )
    return unknown("option", name, CHECKS)


CHECKS: dict[Any, Callable[[Any], Any]] = {
    "method": _one_of("method", METHODS),
    "ignored_layers": _layers("ignored_layers"),
    "activation_scheme": _one_of("activation_scheme", ACTIVATION_SCHEMES),
    "min_features": _integer("min_features", 1),
    "matmul": _boolean("matmul"),
    "compiler": _one_of("compiler", COMPILERS),
    "inductor": _inductor,
    "mode": _mode,
    "mxfp4_scale_alg": _scale_alg,
    "weight_block_size": _block_size,
    "num_bf16_fallback_layers": _integer("num_bf16_fallback_layers", 0),
    "w4a8_fallback_layers": _layers("w4a8_fallback_layers"),
    "w4a8_fallback_steps": _steps,
    "target": _target,
}
