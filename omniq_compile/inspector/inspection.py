"""Everything that ``omniq dump`` shows of a model, as plain data, whatever it is shown as."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from omniq_compile.compiling import inductor
from omniq_compile.inspector.dataflow import Flow, flow_of
from omniq_compile.inspector.generated import LANGUAGES, GeneratedCode, failure, generate, why_not
from omniq_compile.lowering.errors import OmniqError, OptionError
from omniq_compile.lowering.target import Target
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.context import Context
from omniq_compile.passes.legal import STAGES
from omniq_compile.passes.option_checks import check_pattern
from omniq_compile.passes.patterns import matches, unmatched
from omniq_compile.passes.printing.folding import Block, FoldedGraph, fold
from omniq_compile.passes.printing.node_words import is_result, relative
from omniq_compile.passes.printing.sections import Section, added_for, module_names, restrict
from omniq_compile.reports import tracing
from omniq_compile.reports.report import Report, Site, Trace, report_of, trace

_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class SiteView:
    """One GEMM of a part.

    Attributes:
        site: as in the report; for a repeated block, the first block's.
        layer: its name as the block sees it.
        code: by stage, the lines that stand for it.
    """

    site: Site
    layer: str
    code: dict[str, str]


@dataclass(frozen=True)
class Part:
    """The blocks that run the same program, or what is in no block of one graph.

    Attributes:
        graph: the index of the traced graph it was first found in.
        label: in few words, such as ``blocks.0 to blocks.59``; "" for what is in no block.
        kind: the class of the blocks.
        members: the names of the blocks.
        functions: its program by stage, as one Python function.
        sites: in order.
        flow: as few nodes, traced and quantized.
        kernels: what Inductor generated for it; None unless asked for.
        no_kernels: why that is not all of it, where Inductor failed.
    """

    graph: int
    label: str
    kind: str
    members: list[str]
    functions: dict[str, str]
    sites: list[SiteView]
    flow: dict[str, Flow]
    kernels: list[GeneratedCode] | None = None
    no_kernels: str | None = None

    @property
    def count(self) -> int:
        """How many times the model holds it."""
        return max(1, len(self.members))


@dataclass(frozen=True)
class Inspection:
    """A model as omniq compiles it.

    Attributes:
        model: its name.
        layer: the pattern that the parts are restricted to.
        report: what `explain` returns.
        parts: in the order in which they run.
        imports: by stage, the import statements that the functions need.
        no_kernels: why there is no generated code of any part, where it was asked for.
        own_kernels: the device code of omniq's own that the sites run, where code was asked for.
    """

    model: str
    layer: str | None
    report: Report
    parts: list[Part]
    imports: dict[str, list[str]]
    no_kernels: str | None = None
    own_kernels: list[GeneratedCode] = field(default_factory=list)

    def program(self, stage: str, graph: int = 0) -> str:
        """Return one graph at one stage as a Python file: each distinct block, then the rest."""
        lines = [f"# graph {graph}, {stage}, {self.report.target}", "import torch"]
        lines += self.imports[stage]
        for part in sorted((p for p in self.parts if p.graph == graph), key=lambda p: not p.label):
            lines += ["", ""]
            if part.label:
                lines.append(f"# {part.label} ({part.kind}), x {part.count}")
            lines.append(part.functions[stage])
        return "\n".join(lines) + "\n"


def inspect(
    name: str,
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    options: Mapping[str, Any] | QuantConfig,
    *,
    target: str | None = None,
    layer: str | None = None,
    stages: Sequence[str] = STAGES,
    whole: bool = True,
    kernels: bool = False,
) -> Inspection:
    """Trace a model and gather what there is to show.

    Args:
        name: of the model, for titles.
        model, inputs, options, target: as for `explain`.
        layer: show only the layers that this pattern names, and what feeds them.
        stages: those to print, which takes time for each.
        whole: also print each graph unfolded, for the report.
        kernels: also let Inductor generate the code of every part, and read omniq's own kernels.

    Raises:
        OptionError: unknown options or target, or ``layer`` names no layer.
        OmniqError: the model raised when it was called.
    """
    if layer is not None:
        check_pattern("--layer", layer)
    traced = _traced(name, model, inputs, options, target)
    config, contexts = traced.config, traced.contexts
    graphs = {index: dict(context.stages or {}) for index, context in enumerate(contexts)}
    if layer is not None:
        graphs = _restricted(graphs, layer)
    report = report_of(traced, stages if whole else ())
    found = {
        id(site): view
        for context, views in zip(contexts, _by_graph(report, len(contexts)), strict=True)
        for site, view in zip(context.sites, views, strict=True)
    }
    folded = fold(list(graphs.values()))
    no_kernels = None
    if kernels:
        lowered = [graph.stages["lowered"] for graph in folded]
        reasons = (why_not(config, contexts[0].target, gm) for gm in lowered)
        no_kernels = next((reason for reason in reasons if reason), None)
    settings = inductor.settings_of(config) if kernels and no_kernels is None else None
    parts: list[Part] = []
    imports: dict[str, set[str]] = {stage: set() for stage in stages}
    shown: set[int] = set()
    for index, graph in zip(graphs, folded, strict=True):
        things: list[FoldedGraph | Block] = [graph, *graph.blocks()]
        for thing in things:
            if id(thing) not in shown:
                shown.add(id(thing))
                part = _part(index, thing, found, stages, imports)
                if settings is not None:
                    part = replace(part, **_kernels(thing, settings, contexts[0].target))
                parts.append(part)
    return Inspection(
        model=name,
        layer=layer,
        report=report,
        parts=parts,
        imports={stage: sorted(lines) for stage, lines in imports.items()},
        no_kernels=no_kernels,
        own_kernels=_own_kernels(contexts) if kernels else [],
    )


def _traced(name: str, model: nn.Module, *arguments: Any) -> Trace:
    try:
        return trace(model, *arguments)
    except (OmniqError, BackendCompilerFailed):
        raise
    except Exception as error:  # whatever the model raises; its own lines are what there is to know
        own: list[traceback.FrameSummary] = []
        for frame in traceback.extract_tb(error.__traceback__):
            inside = frame.filename.startswith(_TORCH)
            own = [] if frame.filename == tracing.__file__ else own if inside else [*own, frame]
        lines = [*traceback.format_list(own), *traceback.format_exception_only(error)]
        raised = f"calling {name} with its inputs raised {type(error).__name__}:"
        raise OmniqError("\n".join([raised, "".join(lines).rstrip()])) from error


def _own_kernels(contexts: Sequence[Context]) -> list[GeneratedCode]:
    """Return each file of device code that a site's kernel comes from, in the order of sites."""
    used = [site.decision.kernel for context in contexts for site in context.sites]
    files = {kernel.source: kernel for kernel in used if kernel is not None and kernel.source}
    return [
        GeneratedCode(f"lowering/{file}", LANGUAGES[Path(file).suffix], kernel.read_source())
        for file, kernel in files.items()
    ]


def _restricted(
    graphs: dict[int, dict[str, fx.GraphModule]], pattern: str
) -> dict[int, dict[str, fx.GraphModule]]:
    """Restrict graphs, by their index, to a pattern's layers; one that has none is left out."""
    named = {index: module_names([stages["traced"]]) for index, stages in graphs.items()}
    everywhere = [name for names in named.values() for name in names]
    for wrong, near in unmatched([pattern], everywhere).items():
        raise OptionError(
            f"--layer {wrong!r} names no layer of this model; nearest: "
            f"{', '.join(near) or ', '.join(everywhere[:3])}."
        )
    return {
        index: {stage: restrict(gm, pattern) for stage, gm in stages.items()}
        for index, stages in graphs.items()
        if any(matches(pattern, name) for name in named[index])
    }


def _by_graph(report: Report, count: int) -> list[list[Site]]:
    return [[site for site in report.sites if site.graph == index] for index in range(count)]


def _part(
    index: int,
    thing: FoldedGraph | Block,
    found: Mapping[int, Site],
    stages: Sequence[str],
    imports: dict[str, set[str]],
) -> Part:
    """Print one part at some stages, and find its sites in the text."""
    functions: dict[str, str] = {}
    flow: dict[str, Flow] = {}
    inside = thing.sections["traced"].block if isinstance(thing, Block) else ""
    code: dict[int, dict[str, str]] = {
        id(node.meta["omniq_site"]): {} for node in _nodes(thing, "traced") if is_result(node)
    }
    for stage in stages:
        printed, copies = thing.print(stage)
        functions[stage] = "\n".join(printed.text)
        imports[stage].update(printed.imports)
        if stage != "lowered":
            flow[stage] = flow_of(printed.gm, printed.names, inside)
        for node in _nodes(thing, stage):
            if is_result(node):
                site = id(node.meta["omniq_site"])
                lines = (printed.lines.get(copies[n]) for n in added_for(node) if n in copies)
                code[site][stage] = "\n".join(line for line in lines if line)
    return Part(
        graph=index,
        label=thing.label if isinstance(thing, Block) else "",
        kind=thing.kind if isinstance(thing, Block) else "",
        members=list(thing.members) if isinstance(thing, Block) else [],
        functions=functions,
        sites=[
            SiteView(found[site], relative(found[site].layer, inside), by_stage)
            for site, by_stage in code.items()
        ],
        flow=flow,
    )


def _outside(graph: FoldedGraph, stage: str) -> list[Section]:
    return [s for s in graph.sections[stage] if s.block not in graph.block_of]


def _nodes(thing: FoldedGraph | Block, stage: str) -> list[fx.Node]:
    sections = [thing.sections[stage]] if isinstance(thing, Block) else _outside(thing, stage)
    return [node for section in sections for node in section.nodes]


def _kernels(
    thing: FoldedGraph | Block, settings: Mapping[str, Any], target: Target
) -> dict[str, Any]:
    """Generate the code of a block, or of each run of operations between blocks.

    Returns:
        the fields of a `Part`. Where Inductor fails on one run, the others still have theirs.
    """
    if isinstance(thing, Block):
        graphs = [thing.graph("lowered", to_compile=True)[0]]
    else:
        outside = [s for s in _outside(thing, "lowered") if s.outputs]
        graphs = [section.graph(to_compile=True)[0] for section in outside]
    pieces: list[GeneratedCode] = []
    failures = []
    for gm in graphs:
        try:
            pieces += generate(gm, settings, target)
        except Exception as error:  # Inductor may raise anything, and it is shown
            failures.append(failure(error))
    return {"kernels": pieces, "no_kernels": "\n".join(failures) or None}
