"""A part of an inspection drawn as data flow, through Graphviz."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from omniq_compile.inspector.dataflow import Flow, FlowNode
from omniq_compile.inspector.inspection import Inspection, Part
from omniq_compile.inspector.text import part_title
from omniq_compile.lowering.errors import OmniqError


@dataclass(frozen=True)
class Look:
    """How a kind of node is drawn, and what the legend calls it."""

    legend: str
    fill: str
    line: str


LOOKS = {
    "low": Look("low-precision GEMM", "#c9efe4", "#0b6e5d"),
    "quantize": Look("quantize", "#dfe5ff", "#3858d6"),
    "kept": Look("GEMM in the model's own precision", "#fdeecf", "#b57610"),
    "attention": Look("attention", "#f6dcec", "#a83279"),
    "other": Look("pointwise, norms, views", "#eef0f4", "#98a2b3"),
    "input": Look("input", "#ffffff", "#667085"),
    "output": Look("output", "#ffffff", "#667085"),
}
_FONT = "Helvetica,Arial,sans-serif"
_SOFT = "#4b5565"
# What XML cannot hold at all.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")


def chosen_part(inspection: Inspection) -> Part:
    """Return the part to draw: the blocks that make up most of the model's products."""
    return max(inspection.parts, key=lambda part: (bool(part.label), part.count * len(part.sites)))


def render_svg(inspection: Inspection, stage: str) -> str:
    """Draw `chosen_part` at one stage, traced or quantized.

    Raises:
        OmniqError: Graphviz is not installed.
    """
    part = chosen_part(inspection)
    return _svg(part.flow[stage], f"{inspection.model}, {stage}", part_title(part))


def _svg(flow: Flow, title: str, subtitle: str) -> str:
    try:
        import graphviz
    except ImportError as error:
        raise OmniqError(
            "--format svg needs the package graphviz: pip install 'omniq-compile[inspect]'."
        ) from error
    graph = graphviz.Digraph(
        graph_attr={
            "label": _legend(flow, title, subtitle),
            "labelloc": "t",
            "fontname": _FONT,
            "bgcolor": "white",
            "nodesep": "0.25",
            "ranksep": "0.32",
            "pad": "0.3",
        },
        node_attr={
            "shape": "box",
            "style": "filled,rounded",
            "fontname": _FONT,
            "fontsize": "12",
            "margin": "0.14,0.08",
        },
        edge_attr={"color": "#667085", "arrowsize": "0.6"},
    )
    for place, node in enumerate(flow.nodes):
        look = LOOKS[node.kind]
        shape = "ellipse" if node.kind in ("input", "output") else "box"
        graph.node(
            str(place), _label(node), fillcolor=look.fill, color=look.line, shape=shape, tooltip=" "
        )
    for tail, head in flow.edges:
        graph.edge(str(tail), str(head), tooltip=" ")
    try:
        return graph.pipe(format="svg", encoding="utf-8")
    except graphviz.ExecutableNotFound as error:
        raise OmniqError(
            "--format svg needs Graphviz's program dot, which is not installed here: "
            "apt-get install graphviz, brew install graphviz, or https://graphviz.org/download."
        ) from error


def _label(node: FlowNode) -> str:
    lines = [f"<B>{_escaped(node.title)}</B>"]
    lines += [
        f'<FONT POINT-SIZE="10" COLOR="{_SOFT}">{_escaped(line)}</FONT>' for line in node.lines
    ]
    return f"<{'<BR/>'.join(lines)}>"


def _legend(flow: Flow, title: str, subtitle: str) -> str:
    used = {node.kind for node in flow.nodes} - {"input", "output"}
    looks = [look for kind, look in LOOKS.items() if kind in used]
    cells = "".join(
        f'<TD BGCOLOR="{look.fill}" COLOR="{look.line}" BORDER="1" STYLE="rounded" '
        f'CELLPADDING="5"><FONT POINT-SIZE="11">{_escaped(look.legend)}</FONT></TD>'
        for look in looks
    )
    span = f'COLSPAN="{max(1, len(looks))}"'
    rows = [
        f'<TD {span}><FONT POINT-SIZE="18"><B>{_escaped(title)}</B></FONT></TD>',
        f'<TD {span}><FONT POINT-SIZE="13" COLOR="{_SOFT}">{_escaped(subtitle)}</FONT></TD>',
        *([cells] if cells else []),
    ]
    table = "".join(f"<TR>{row}</TR>" for row in rows)
    return f'<<TABLE BORDER="0" CELLSPACING="7" CELLPADDING="1">{table}</TABLE>>'


def _escaped(text: str) -> str:
    return html.escape(_CONTROL.sub(" ", text)) or " "
