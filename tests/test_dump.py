"""``omniq dump``: a model's sites and stages as text, and errors that say what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from torch import nn

from omniq_compile.cli import main
from omniq_compile.models.random_models import random_model

MODULE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(38, 290), nn.Linear(290, 270)

    def forward(self, x, scale=1.0):
        return self.down(torch.relu(self.up(x))) * scale

class Parted(Model):
    def forward(self, x):
        x = self.up(x)
        torch._dynamo.graph_break()
        return self.down(torch.relu(x))

def parted():
    return Parted(), (torch.randn(7, 38),)

def named():
    return Model(), {"x": torch.randn(7, 38), "scale": 2.0}

def positional():
    return Model(), (torch.randn(7, 38),)

def wrong():
    return Model()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Write a module into a fresh working directory; returns its name."""
    name = f"model_of_{abs(hash(request.node.nodeid))}"  # a module is imported once a process
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def dump(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["dump", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("function", ["named", "positional"])
def test_a_function_of_mine_is_dumped(
    here: str, function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = dump(capsys, f"{here}:{function}", "--method", "int8")
    assert (code, err) == (0, "")
    assert f"# {here}:{function}: int8 on cpu:" in out
    # Codes and scales of [270, 290] instead of its BF16: here float32.
    assert "# 2 sites: 1 rewritten, 1 kept; their weights 313,200 -> 79,380 bytes" in out
    assert "# kept 1: K = 38 is under min_features = 256" in out
    assert "# up     linear    7 x 38 x 290   kept      K = 38 is under min_features = 256" in out
    assert "# down   linear    7 x 290 x 270  int8      cpu_s8_" in out
    assert out.count("def forward(") == 2
    assert [out.count(f", {stage}, ") for stage in ("traced", "quantized", "lowered")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("stages", "counts"),
    [
        (["traced"], [1, 0, 0]),
        (["lowered"], [0, 0, 1]),
        (["lowered", "traced", "quantized"], [1, 1, 1]),
    ],
)
def test_stage_chooses_what_is_printed(
    here: str, stages: list[str], counts: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = dump(capsys, f"{here}:named", "--method", "int8", "--stage", *stages)
    assert code == 0
    found = [out.count(f"# graph 0, {s}, ") for s in ("traced", "quantized", "lowered")]
    assert found == counts
    assert ("torch.ops.omniq.gemm" in out) == ("quantized" in stages)


@pytest.mark.parametrize(
    ("options", "rewritten"),
    [
        (["--min-features", "38"], 2),
        (["--min-features", "38", "--ignored-layers", "up"], 1),
        (["--ignored-layers", "up", "down"], 0),
    ],
)
def test_options_reach_the_passes(
    here: str, options: list[str], rewritten: int, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = dump(capsys, f"{here}:named", "--method", "int8", *options)
    assert code == 0
    assert f"# 2 sites: {rewritten} rewritten, {2 - rewritten} kept" in out


def test_a_pattern_that_matches_nothing_is_told(
    here: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = dump(capsys, f"{here}:named", "--method", "int8", "--ignored-layers", "downs")
    assert "# pattern 'downs' matches nothing; nearest: down" in out


def test_out_writes_what_would_be_printed(
    here: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (f"{here}:named", "--method", "int8")
    _, printed, _ = dump(capsys, *arguments)
    file = tmp_path / "graph.py"
    assert dump(capsys, *arguments, "--out", str(file)) == (0, "", "")
    assert file.read_text() == printed
    # A dump is a Python file.
    compile(printed, str(file), "exec")


@pytest.mark.parametrize("target", ["cpu:generic", "cpu:avx512_vnni"])
def test_target_lowers_for_another_machine(
    here: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = dump(
        capsys, f"{here}:named", "--method", "int8", "--target", target, "--stage", "lowered"
    )
    assert code == 0
    assert f"int8 on {target}" in out
    uses = set(re.findall(r"omniq\.int8_matmul\(\w+, \w+, (\w+)\)", out))
    assert uses == {str(target == "cpu:avx512_vnni")}


def test_a_class_with_a_preset_is_dumped(capsys: pytest.CaptureFixture[str]) -> None:
    name = "FluxTransformer2DModel:tiny"
    options = ("--method", "int8", "--min-features", "64", "--stage", "quantized")
    code, out, _ = dump(capsys, name, *options)
    assert code == 0
    assert out.startswith(f"# {name}: int8 on cpu:")
    modules = random_model("FluxTransformer2DModel", "tiny").named_modules()
    linears = [n for n, m in modules if isinstance(m, nn.Linear)]
    # The second of two equal blocks is not printed again.
    shown = [n for n in linears if not n.startswith("transformer_blocks.1.")]
    assert len(linears) > len(shown) > 20
    assert out.count("torch.ops.omniq.gemm.default(") == len(shown)
    title = "# transformer_blocks.0 to transformer_blocks.1 (FluxTransformerBlock), x 2\n"
    assert out.count(title) == 2  # over the table's rows and over the function
    assert "    for weights in transformer_blocks:  # x 2\n" in out
    assert "    # attn.to_q\n" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["FluxTransformer2DModl:tiny", "--method", "int8"],
         ["unknown transformer class 'FluxTransformer2DModl'",
          "Did you mean 'FluxTransformer2DModel'?", "Valid: ", "WanTransformer3DModel"]),
        (["FluxTransformer2DModel:tinny", "--method", "int8"],
         ["unknown preset 'tinny'", "Did you mean 'tiny'?"]),
        (["HERE:name", "--method", "int8"], ["Did you mean 'named'?", "positional"]),
        (["HERE:wrong", "--method", "int8"], ["must return (model, inputs)", "Model"]),
        (["HEREx:named", "--method", "int8"], ["unknown module"]),
        (["./nowhere", "--method", "int8"], ["no folder or configuration ./nowhere"]),
        (["HERE:named", "--method", "int9"], ["unknown method 'int9'. Did you mean 'int8'?"]),
        (["HERE:named", "--method", "int8", "--target", "gpu"], ["unknown target device 'gpu'"]),
        (["HERE:named", "--method", "int8", "--min-features", "0"], ["'min_features'"]),
        (["HERE:named", "--method", "int8", "--out", "no/such/folder/x.py"],
         ["cannot write 'no/such/folder/x.py': No such file or directory."]),
        (["HERE:named", "--method", "int8", "--out", "."], ["cannot write '.': Is a directory."]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_on_stderr_and_code_2(
    here: str, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = dump(capsys, *(a.replace("HERE", here) for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("omniq dump: error: ")
    assert [word for word in words if word not in err] == []
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [[], ["dmup"], ["dump"], ["dump", "x:y"], ["dump", "x:y", "--method", "int8", "-z"]],
)
def test_arguments_that_cannot_be_read_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: omniq" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert [name for name in ("dump", "bench", "kernels") if name not in out] == []


@pytest.mark.parametrize(("layer", "graph"), [("up", 0), ("down", 1)])
def test_a_layer_is_shown_in_the_graph_that_it_is_in(
    here: str, layer: str, graph: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (f"{here}:parted", "--method", "int8", "--min-features", "1", "--layer", layer)
    code, text, _ = dump(capsys, *arguments, "--stage", "lowered")
    assert code == 0
    assert re.findall(r"^# graph (\d), lowered", text, re.MULTILINE) == [str(graph)]
    # What the whole report says of the layer does not depend on what is shown.
    document = json.loads(dump(capsys, *arguments, "--format", "json")[1])
    of_layer = {site["layer"]: site["graph"] for site in document["report"]["sites"]}
    assert of_layer == {"up": 0, "down": 1}
    (part,) = document["parts"]
    assert [site["site"]["layer"] for site in part["sites"]] == [layer]
    assert part["graph"] == part["sites"][0]["site"]["graph"] == graph
