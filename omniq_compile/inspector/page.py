"""An inspection as one HTML file that needs nothing else: no network, no other file.

Every string goes through Jinja's escaping, and a content security policy lets the browser run no
script but the page's own, whatever a model calls its layers.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

import omniq_compile
from omniq_compile.inspector.inspection import Inspection, Part, SiteView
from omniq_compile.inspector.text import part_title
from omniq_compile.reports.display import untraced_line


@dataclass(frozen=True)
class Leaf:
    """A site of the tree, by its name from the module that it is shown in."""

    name: str
    view: SiteView


@dataclass(frozen=True)
class Module:
    """A module of the tree: the sites and modules in it, in the order in which they run."""

    name: str
    entries: list[Module | Leaf] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many sites are in it and below it."""
        return sum(e.count if isinstance(e, Module) else 1 for e in self.entries)


def render_page(inspection: Inspection) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("omniq_compile.inspector", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"python": _python, "size": human_size, "percent": _percent}
    assert environment.loader is not None
    script, style = (
        environment.loader.get_source(environment, name)[0] for name in ("page.js", "page.css")
    )
    digest = hashlib.sha256(script.encode()).digest()
    report = inspection.report
    return environment.get_template("page.html.j2").render(
        # The project's own files, and nothing of a model's.
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(digest).decode(),
        version=omniq_compile.__version__,
        inspection=inspection,
        report=report,
        untraced=untraced_line(report.untraced),
        parts=[_part(part) for part in inspection.parts],
    )


def tree(sites: Iterable[SiteView]) -> Module:
    """Arrange sites by the dotted names of their layers; what is alone in a module takes its name.

    A module that runs in two places, with others between them, is still one.
    """
    root = Module("")
    modules = {"": root}
    for site in sites:
        *above, name = (site.layer or "(root)").split(".")
        module = root
        for depth, part in enumerate(above, 1):
            path = ".".join(above[:depth])
            if path not in modules:
                modules[path] = Module(part)
                module.entries.append(modules[path])
            module = modules[path]
        module.entries.append(Leaf(name, site))
    return Module("", [_joined(entry) for entry in root.entries])


def human_size(count: int | None) -> str:
    """Word a number of bytes, in powers of 1000."""
    if count is None:
        return "-"
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def _part(part: Part) -> dict[str, Any]:
    befores = [view.site.weight_bytes_before or 0 for view in part.sites]
    afters = [view.site.weight_bytes_after or 0 for view in part.sites]
    return {
        "part": part,
        "title": part.label or "outside the blocks",
        "full_title": part_title(part),
        "tree": tree(part.sites),
        "rewritten": sum(view.site.decision.method is not None for view in part.sites),
        "before": part.count * sum(befores),
        "after": part.count * sum(afters),
    }


def _joined(entry: Module | Leaf) -> Module | Leaf:
    if isinstance(entry, Leaf):
        return entry
    entries = [_joined(below) for below in entry.entries]
    if len(entries) == 1:
        return replace(entries[0], name=f"{entry.name}.{entries[0].name}")
    return Module(entry.name, entries)


def _python(code: str) -> Markup:
    """Colour a few lines of Python, each comment below its line; the formatter escapes them."""
    code = code.replace("  # ", "\n    # ")
    return Markup(highlight(code, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip())


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "0"
