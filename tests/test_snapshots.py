"""What every method becomes, for every target and family, as small files that a reviewer can read.

`test_lowering`: one linear layer as each target runs it. Targets that run the same operations
share them, and all but the first show what they do otherwise. `test_family`: one model with a block
of each kind: the kernels that each target chooses for its products, and its graph after the passes;
for other methods than int8 only what omniq wrote into it. After a change that you mean, run
`pytest --snapshot-update`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from conftest import Holder, traced
from torch import fx

from omniq_compile.lowering.schemes import METHODS
from omniq_compile.lowering.target import ARCHITECTURES, Target
from omniq_compile.models.families import FAMILIES
from omniq_compile.models.random_models import make_inputs, random_model
from omniq_compile.passes import pipeline, policy
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.context import Context
from omniq_compile.passes.match import find_sites
from omniq_compile.passes.printing.program import program
from omniq_compile.passes.sites import Site
from omniq_compile.testing import GraphSnapshot

TARGETS = [Target(device, arch) for device, archs in ARCHITECTURES.items() for arch in archs]
FIRST = ("QwenImage", "Wan", "ZImage", "Flux")
FAMILY_NAMES = [name for name in FAMILIES if name.startswith(FIRST)]


# Options that make other formats of a method.
VARIANTS: dict[str, dict[str, Any]] = {
    "fp8 block-wise": {"method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4 W4A8": {"method": "mxfp4", "w4a8_fallback_layers": ["re:.*"]},
}


def options(method: str) -> QuantConfig:
    given = VARIANTS.get(method, {"method": method})
    config = QuantConfig.from_options({"min_features": 1} | given)
    return dataclasses.replace(config, num_bf16_fallback_layers=0)


@cache
def linear() -> fx.GraphModule:
    """A layer of which M, K and N all suit every kernel."""
    tensors = {"w": torch.randn(384, 256), "b": torch.randn(384)}
    model = Holder(torch.nn.functional.linear, **{n: t.bfloat16() for n, t in tensors.items()})
    [(gm, _)] = traced(model, torch.randn(2, 512, 256).bfloat16())
    return gm


@cache
def family(name: str) -> list[fx.GraphModule]:
    model = random_model(name, width=64, num_blocks=1)
    inputs = make_inputs(model, image_tokens=16, text_tokens=8)
    return [gm for gm, _ in traced(model, **inputs)]


@cache
def sites(name: str) -> list[Site]:
    return [site for gm in family(name) for site in find_sites(gm)]


def stage(gm: fx.GraphModule, config: QuantConfig, target: Target, name: str) -> str:
    context = Context(config, target, stages={})
    # What comes after the stage takes longest.
    last = [step.ends for step in pipeline.PASSES].index(name)
    pipeline.run(gm, context, passes=pipeline.PASSES[: last + 1])
    assert context.stages is not None
    return program(context.stages[name])


@pytest.mark.parametrize("method", [*METHODS, *VARIANTS])
def test_lowering(method: str, graph_snapshot: GraphSnapshot) -> None:
    config = options(method)
    texts: dict[str, list[str]] = {}
    for target in TARGETS:
        texts.setdefault(stage(linear(), config, target, "lowered"), []).append(str(target))
    first, *others = texts
    parts = [f"# {', '.join(texts[first])}\n{first}"]
    for text in others:
        parts.append(f"# {', '.join(texts[text])}, beside the first:\n{changes(first, text)}")
    assert sorted(t for targets in texts.values() for t in targets) == sorted(map(str, TARGETS))
    graph_snapshot.compare("\n".join(parts))


def changes(old: str, new: str) -> str:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return "".join(f"{line}\n" for line in list(lines)[2:] if not line.startswith("@@"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_family(name: str, method: str, graph_snapshot: GraphSnapshot) -> None:
    config, graphs = options(method), family(name)
    lines = ["# The kernels that each target chooses, and for how many products:"]
    for target in TARGETS:
        lines.append(f"#   {target}: {kernels(sites(name), config, target)}")
    # Which kernel it is on this target is said above, and does not change the graph.
    programs = [stage(gm, config, Target("cpu", "generic"), "quantized") for gm in graphs]
    short = [re.sub(rf"  {method}: \w+$", "", text, flags=re.M) for text in programs]
    shown = short if method == "int8" else [written(text) for text in short]
    graph_snapshot.compare("\n".join([*lines, *shown]))


def written(text: str) -> str:
    """Return the lines that call omniq's operators, and the name of the layer above each."""
    kept: list[str] = []
    layer = ""
    for line in text.splitlines():
        if line.startswith("    # "):
            layer = line
        elif "torch.ops.omniq." in line:
            kept += [line] if layer in kept else [layer, line]
    return "\n".join(kept) + "\n"


def kernels(sites: list[Site], config: QuantConfig, target: Target) -> str:
    policy.decide(sites, config, target)
    chosen: Counter[str] = Counter()
    for site in sites:
        kernel: Any = site.decision.kernel
        chosen[kernel.name if kernel else f"kept, {site.decision.reason}"] += 1
    return ", ".join(f"{name} x {count}" for name, count in chosen.items())
