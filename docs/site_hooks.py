"""Hooks of the site: its order, tables that are made from the code, links out of this folder."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import omniq_compile
from omniq_compile.kernel_table import kernels
from omniq_compile.lowering.schemes import METHODS
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.option_checks import CHECKS, METHODS_OF

# Pages that are not named here follow, in alphabetical order.
FIRST = (
    "index.md", "methods.md", *(f"{method}.md" for method in METHODS), "hardware.md", "models.md",
    "options.md", "loading.md", "diffusers.md", "first_calls.md", "troubleshooting.md",
    "compare.md", "tune.md", "plan.md", "inspector.md", "snapshots.md", "api.md",
    "architecture.md", "adding.md",
)  # fmt: skip


def on_config(config: Any) -> Any:
    """Order the pages that exist."""
    folder = Path(config["docs_dir"])
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.md"))
    first = [name for name in FIRST if name in found]
    config["nav"] = [*first, *(name for name in found if name not in first)]
    return config


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    """Put the tables in, and turn links to files of the repository into their names."""
    for name, table in TABLES.items():
        markdown = markdown.replace(f"<!-- table: {name} -->", table())
    markdown = markdown.replace("](../README.md)", "](index.md)")
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)


def hardware() -> str:
    """Return the (method, target) table, as ``omniq kernels`` prints it."""
    rows = [("method", "target", "kernel", "kind", "about"), ("---",) * 5]
    for row in kernels():
        kind = "native" if row.native else "emulated"
        rows.append((row.method, f"`{row.target}`", f"`{row.kernel}`", kind, row.about))
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)


def hardware_of(method: str) -> str:
    """Return the rows of one method, the kernel that each target tries first."""
    rows, targets = [("target", "first kernel", "kind", "about"), ("---",) * 4], set()
    for row in kernels():
        if row.method == method and row.target not in targets:
            targets.add(row.target)
            kind = "native" if row.native else "emulated"
            rows.append((f"`{row.target}`", f"`{row.kernel}`", kind, row.about))
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)


def options() -> str:
    """Return the options with their defaults and what `QuantConfig` says of them."""
    text = inspect.getdoc(QuantConfig) or ""
    about = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text, re.M))
    defaults = {field.name: field for field in dataclasses.fields(QuantConfig)}
    rows = [("option", "default", "methods", "meaning"), ("---",) * 4]
    for name in CHECKS:
        words = " ".join(about[name].replace("``", "`").split())
        methods = ", ".join(METHODS_OF.get(name, ("all",)))
        rows.append((f"`{name}`", _default(defaults[name]), methods, words))
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)


def api() -> str:
    """Return every public name, with its signature and what its docstring says."""
    parts = []
    for name in omniq_compile.__all__:
        thing = getattr(omniq_compile, name)
        if callable(thing):
            text = inspect.getdoc(thing) or ""
            parts.append(f"## `{name}{_signature(thing)}`\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def _signature(thing: Any) -> str:
    if isinstance(thing, type) and (issubclass(thing, Exception) or not thing.__init__.__doc__):
        return "" if not dataclasses.is_dataclass(thing) else "(...)"
    names = list(inspect.signature(thing).parameters.values())
    return f"({', '.join(str(p.replace(annotation=p.empty)) for p in names)})"


def _default(field: Any) -> str:
    if field.name == "num_bf16_fallback_layers":
        return (
            f"`{QuantConfig.from_options({'method': 'mxfp4_dualscale'}).num_bf16_fallback_layers}`"
        )
    if field.default is not dataclasses.MISSING:
        value = [] if field.default == () else field.default
        return f"`{value!r}`"
    return "`{}`" if field.default_factory is not dataclasses.MISSING else "required"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


TABLES: dict[str, Callable[[], str]] = {
    "hardware": hardware,
    "options": options,
    "api": api,
    **{f"hardware {method}": partial(hardware_of, method) for method in METHODS},
}
