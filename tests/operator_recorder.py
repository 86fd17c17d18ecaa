"""Stands in for operators of libraries that are not here, and holds each call to its record.

``operator_schemas/*.toml`` has, for every operator that omniq calls, its schema and the documented
combinations of dtypes, shapes and layouts. A `Recorder` binds a call against the schema as the
operator's own dispatcher would, and then looks for a documented combination that it is.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SCHEMAS = Path(__file__).parent / "operator_schemas"

# What a value of each type of a schema may be. Torch takes a dtype for an int that stands for one.
_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": (torch.Tensor,),
    "int": (int, torch.dtype),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "ScalarType": (torch.dtype,),
    "List[int]": (list, tuple),
}


class WrongCall(AssertionError):
    """A call that the operator does not document."""


@dataclass
class Call:
    """One call: the operator, its arguments by name, and which documented combination it is."""

    operator: str
    case: str
    arguments: dict[str, Any]


@dataclass
class Recorder:
    """Checks calls of one library's operators.

    Attributes:
        library: a file of `SCHEMAS`.
        where: the architecture that is called for; a combination of another one does not count.
        calls: what was called so far.
    """

    library: str
    where: str
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = tomllib.loads((SCHEMAS / f"{self.library}.toml").read_text("utf-8"))

    def bind(self, operator: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Check a call, and remember it.

        Raises:
            WrongCall: the schema or every documented combination is against it.
        """
        row = self.table[operator]
        defaults, arguments = _bind(row["schema"], args, kwargs)
        reasons = []
        for case in row["case"]:
            if self.where not in case["where"]:
                continue
            reason = _mismatch(case, defaults, arguments)
            if reason is None:
                call = Call(operator, case["name"], arguments)
                self.calls.append(call)
                return call
            reasons.append(f"not {case['name']!r}: {reason}")
        raise WrongCall(f"{operator} on {self.where}: {'; '.join(reasons) or 'not offered'}")


def _bind(
    text: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the defaults of a schema, and the value of each of its arguments."""
    schema = torch._C.parse_schema(text)
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    if len(args) > len(positional):
        raise WrongCall(f"{schema.name} takes {len(positional)} positional arguments: {len(args)}")
    given = dict(zip(positional, args, strict=False))
    known = {a.name: a for a in schema.arguments}
    for name, value in kwargs.items():
        if name not in known or name in given:
            raise WrongCall(f"{schema.name} has no argument {name!r} left to give")
        given[name] = value
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    for name, argument in known.items():
        if name not in given and name not in defaults:
            raise WrongCall(f"{schema.name} needs {name!r}")
        kind = str(argument.type)
        value = given.get(name, defaults.get(name))
        if kind.startswith("Optional["):
            kind = kind.removeprefix("Optional[").removesuffix("]")
            if value is None:
                continue
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise WrongCall(f"{schema.name}: {name} is {type(value).__name__}, not {kind}")
    return defaults, defaults | given


def _mismatch(
    case: dict[str, Any], defaults: dict[str, Any], arguments: dict[str, Any]
) -> str | None:
    """Return why a call is not a documented combination, or None where it is."""
    dtypes, values = case.get("dtypes", {}), case.get("values", {})
    for name, value in arguments.items():
        if name in dtypes:
            if value is None:
                if name not in case.get("optional", ()):
                    return f"{name} is missing"
                continue
            allowed = {
                str(arguments[d[1:]]) if d.startswith("=") else f"torch.{d}" for d in dtypes[name]
            }
            if str(value.dtype) not in allowed:
                return f"{name} is {value.dtype}, not one of {sorted(allowed)}"
        elif name in values:
            plain = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            plain = list(plain) if isinstance(plain, tuple) else plain
            if plain not in values[name]:
                return f"{name} = {plain!r}, not one of {values[name]}"
        elif value is not defaults.get(name) and value != defaults.get(name):
            return f"{name} is given"
    known = {"ceil": math.ceil, **arguments}
    try:
        known |= {name: eval(text, known) for name, text in case.get("dims", {}).items()}
        for name, text in case.get("shapes", {}).items():
            if arguments[name] is not None and list(arguments[name].shape) != eval(text, known):
                return f"{name} is {list(arguments[name].shape)}, not {text} = {eval(text, known)}"
        for rule in case.get("rules", ()):
            if not eval(rule, known):
                return f"{rule} does not hold"
    except (IndexError, AttributeError) as error:
        return str(error)
    return None
