"""``omniq dump`` where Inductor or a pass fails, and the stages that nobody asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import omniq_compile as omniq
from omniq_compile.cli import main
from omniq_compile.inspector import absent_gpu
from omniq_compile.inspector.inspection import inspect
from omniq_compile.passes.printing.node_words import weight_of
from omniq_compile.passes.printing.sections import split
from omniq_compile.reports.report import trace

MODULE = """
import torch
from torch import nn

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(38, 70), nn.Linear(70, 19)

class FromTheCpu(Layers):
    def forward(self, x):
        return self.down(self.up(x) + torch.randn(5, 70))

class Prints(Layers):
    def forward(self, x):
        print("printed by the model")
        return self.down(self.up(x))

class Raises(Layers):
    def forward(self, x):
        torch._dynamo.graph_break()
        return {}["a key of mine"]

class DoesNotFit(Layers):
    def forward(self, x):
        return self.down(x)

def made(kind):
    return lambda: (kind(), (torch.randn(5, 38),))

from_the_cpu, prints = made(FromTheCpu), made(Prints)
raises, does_not_fit = made(Raises), made(DoesNotFit)
"""
INT8 = ("--method", "int8", "--min-features", "1")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Write a module into a fresh working directory; returns its name."""
    name = f"failing_{abs(hash(request.node.nodeid))}"  # a module is imported once a process
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_where_inductor_fails_it_is_said_and_the_rest_is_shown(
    mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`randn` without a device makes a tensor on the CPU, also where the model is on a GPU."""
    pytest.importorskip("triton")
    command = ["dump", f"{mine}:from_the_cpu", *INT8, "--target", "cuda:sm_90"]
    assert main([*command, "--stage", "quantized", "kernels"]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"\n# Inductor failed with \w+: .*devices,? cuda:0(,| and) cpu", out)
    assert "self.down(self.up(x) + torch.randn(5, 70))" in out
    assert "device=x.device" in out
    assert out.count("torch.ops.omniq.gemm.default(") == 2
    assert "triton_row_scaled_gemm(" in out
    assert "# Triton: lowering/triton_kernels/row_scaled_gemm.py, omniq's own" in out
    assert "stage kernels of graph 0, outside the blocks: Inductor failed with " in err
    assert "Traceback (most recent" not in out + err


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(38, 70), nn.Linear(70, 19)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def shifted(y: torch.Tensor) -> torch.Tensor:
            return y + torch.arange(70, device="cpu")

        y = self.up(x)
        return self.down(torch.cond(y.sum() > 0, shifted, lambda y: y * 2, (y,)))


def test_a_graph_that_is_compiled_keeps_the_graphs_that_it_calls() -> None:
    """As inputs, which no compiler takes, the branches of `torch.cond` had no code."""
    model, x = Branches().eval(), torch.randn(5, 38)
    (context,) = trace(model, [x], {"method": "int8", "ignored_layers": ["re:.*"]}).contexts
    assert context.stages is not None
    (section,) = split(context.stages["lowered"])
    gm, _ = section.graph(to_compile=True)
    given = {"l_args_0_": x} | {
        node.name: model.get_parameter(str(weight_of(node)))
        for node in section.inputs
        if weight_of(node) is not None
    }
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    (result,) = gm(*[given[node.name] for node in inputs])
    assert torch.equal(result, model(x))

    moved, _ = absent_gpu.moved(gm, [])
    printed = "".join(branch.code for branch in moved.children())
    assert "torch.arange(70, device = 'cuda')" in printed
    assert "cpu" not in printed


def test_what_a_model_prints_is_no_part_of_the_result(
    mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dump", f"{mine}:prints", *INT8, "--option", 'compiler="eager"']
    assert main([*command, "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["version"] == 1
    assert "printed by the model" in err


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", ["raised KeyError", "in forward", "KeyError: 'a key of mine'"]),
        ("does_not_fit", ["return self.down(x)"]),
    ],
)
def test_what_a_model_raises_is_shown_by_its_own_lines(
    function: str, words: list[str], mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dump", f"{mine}:{function}", *INT8]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"omniq dump: error: calling {mine}:{function} with its inputs raised " in err
    assert [word for word in words if word not in err] == []
    assert f'{mine}.py", line ' in err
    assert "cli/__init__.py" not in err


def test_what_the_passes_refuse_is_omniqs_own_error() -> None:
    """Dynamo puts its own around it."""
    model, inputs = nn.Sequential(nn.Linear(38, 19)).eval(), [torch.randn(5, 38)]
    with pytest.raises(omniq.OptionError, match="num_bf16_fallback_layers = 5 keeps"):
        omniq.explain(model, inputs, {"method": "mxfp4_dualscale", "min_features": 1})


def test_only_the_stages_that_are_asked_for_are_printed() -> None:
    model, inputs = nn.Sequential(nn.Linear(38, 19), nn.ReLU()).eval(), [torch.randn(5, 38)]
    options = {"method": "int8", "min_features": 1}
    every = omniq.explain(model, inputs, options).graphs[0].programs
    assert list(every) == ["traced", "quantized", "lowered"]
    some = omniq.explain(model, inputs, options, stages=["lowered"])
    assert some.graphs[0].programs == {"lowered": every["lowered"]}
    with pytest.raises(omniq.OptionError, match=r"unknown stage 'lower'. Did you mean 'lowered'"):
        omniq.explain(model, inputs, options, stages=["lower"])

    all_parts = inspect("model", model, inputs, options)
    few = inspect("model", model, inputs, options, stages=["quantized"], whole=False)
    for whole, part in zip(all_parts.parts, few.parts, strict=True):
        assert part.functions == {"quantized": whole.functions["quantized"]}
        assert [view.site for view in part.sites] == [view.site for view in whole.sites]
    assert few.report.graphs[0].programs == {}
    assert few.program("quantized") == all_parts.program("quantized")
