"""``omniq dump`` in its formats, for models without weights, and what it says of bad input."""

from __future__ import annotations

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from test_folding import Model
from torch import nn

from omniq_compile.cli import main
from omniq_compile.inspector.dataflow import Flow
from omniq_compile.inspector.drawing import LOOKS, render_svg
from omniq_compile.inspector.inspection import inspect
from omniq_compile.models.argument import find_model

MODULE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(38), nn.Linear(38, 70), nn.Linear(70, 38)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.last = nn.Linear(38, 19)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)

def model():
    return Model(), (torch.randn(5, 38),)

def fails():
    return {}["a key of mine"]
"""
QUICK = ("--method", "int8", "--min-features", "1", "--option", 'compiler="eager"')
CONFIG = {
    "_class_name": "QwenImageTransformer2DModel",
    "_diffusers_version": "0.36.0",
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 70,
    "axes_dims_rope": [4, 14, 14],
}
needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None, reason="no dot here: .ci/browser installs graphviz"
)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Write a module into a fresh working directory; returns its name."""
    name = f"inspected_{abs(hash(request.node.nodeid))}"  # a module is imported once a process
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def dump(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["dump", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_configuration_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pipe" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pipe" / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", CONFIG["_class_name"]]})
    )
    named = [folder / "config.json", folder, tmp_path / "pipe"]
    models = [find_model(str(path)).model for path in named]
    assert [type(model).__name__ for model in models] == [CONFIG["_class_name"]] * 3
    assert {model.config.num_layers for model in models} == {2}
    model = named[0]
    code, out, _ = dump(capsys, str(model), *QUICK, "--layer", "img_mlp", "--stage", "traced")
    assert code == 0
    assert "(QwenImageTransformerBlock), x 2" in out
    assert "img_mlp.net.2  " in out
    assert "meta" not in out


def test_a_difference_is_plain_text_for_a_file(
    mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = dump(capsys, f"{mine}:model", *QUICK, "--diff")
    assert code == 0
    assert "\x1b" not in out
    title = "blocks.0 to blocks.3 (Block), x 4"
    assert f"--- traced: {title}\n+++ quantized: {title}\n@@ " in out
    removed = re.findall(r"^-    \w+ = (.*?)\(", out, re.M)
    added = re.findall(r"^\+    \w+ = (.*?)\(", out, re.M)
    assert removed == ["torch._C._nn.linear"] * 3
    assert added == ["torch.ops.omniq.quantize.default", "torch.ops.omniq.gemm.default"] * 3
    # The rest keeps its names, and so stays out of the difference.
    assert not re.search(r"^[-+].*(layer_norm|relu)\(", out, re.M)


def test_a_terminal_gets_colours(
    mine: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    arguments = (f"{mine}:model", *QUICK, "--layer", "last", "--diff")
    _, coloured, _ = dump(capsys, *arguments)
    removed, added = (
        next(line for line in coloured.splitlines() if word in line)
        for word in ("_C._nn.linear(", "omniq.gemm.default(")
    )
    assert re.match(r"\x1b\[\d+m-", removed)
    assert re.match(r"\x1b\[\d+m\+", added)
    assert removed[:5] != added[:5]
    monkeypatch.setenv("NO_COLOR", "1")
    _, plain, _ = dump(capsys, *arguments)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured).split() == plain.split()


def test_a_pattern_restricts_every_stage(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = dump(capsys, f"{mine}:model", *QUICK, "--layer", "blocks.2.down")
    assert code == 0
    assert "# shown: the layers that 'blocks.2.down' names, and what feeds them\n" in out
    assert out.count("torch.ops.omniq.gemm.default(") == 1
    assert "relu" in out
    assert "layer_norm" not in out
    compile(out, "dump", "exec")


def test_generated_code_is_shown(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--method", "int8", "--min-features", "1", "--stage", "kernels")
    code, out, _ = dump(capsys, f"{mine}:model", *arguments, "--layer", "last")
    assert code == 0
    assert 'extern "C"  void  kernel(' in out
    assert re.search(r"# Python: call\nargs.clear\(\)", out)
    code, out, _ = dump(capsys, f"{mine}:model", *arguments, "--target", "rocm:gfx942")
    assert code == 0
    assert "# no code is generated: " in out
    assert "The lowered program is what Inductor would compile for rocm:gfx942" in out
    assert "lowered, rocm:gfx942" in out


@pytest.mark.parametrize(
    ("method", "target", "files"),
    [
        ("int8", "cuda:sm_90", {"triton_kernels/row_scaled_gemm.py": "tl.dot("}),
        ("mxfp4", "npu:ascend950", {}),
        ("mxfp4", "cuda:sm_100", {"triton_kernels/mx_gemm.py": "tl.dot_scaled("}),
        ("mxfp8", "cpu:avx512_bf16", {"cpu/tile_gemm.cpp": "brgemm("}),
        ("int8", "cpu:avx512_vnni", {}),
    ],
)
def test_device_code_of_omniqs_own_is_shown_for_any_target(
    mine: str, method: str, target: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--method", method, "--min-features", "1", "--target", target)
    # Nothing is generated, which takes long.
    arguments += ("--option", 'compiler="eager"')
    code, out, _ = dump(capsys, f"{mine}:model", *arguments, "--stage", "kernels")
    assert code == 0
    found = out.split("\n# ")
    shown = {part.split(",")[0]: part for part in found if "omniq's own\n" in part}
    assert set(shown) == {f"{'C++' if '.cpp' in f else 'Triton'}: lowering/{f}" for f in files}
    for file, words in files.items():
        assert any(file in name and words in out for name in shown)
    assert "omniq's own" not in dump(capsys, f"{mine}:model", *arguments)[1]


def test_the_document_holds_what_the_report_does(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dump.json"
    arguments = (f"{mine}:model", *QUICK, "--format", "json", "--out", str(file))
    assert dump(capsys, *arguments) == (0, "", "")
    document = json.loads(file.read_text())
    assert document["version"] == 1
    keys = {"version", "omniq", "model", "layer", "report", "parts", "imports",
            "no_kernels", "own_kernels"}  # fmt: skip
    assert set(document) == keys
    report = document["report"]
    assert [site["layer"] for site in report["sites"]][-1] == "last"
    assert len(report["sites"]) == 9
    assert all(set(graph["programs"]) == {"traced", "quantized", "lowered"}
               for graph in report["graphs"])  # fmt: skip
    outside, block = document["parts"]
    assert block["members"] == [f"blocks.{i}" for i in range(4)]
    # Every function of a part is Python, and every product of the model is in some part.
    for stage, imports in document["imports"].items():
        for part in document["parts"]:
            compile("\n".join([*imports, part["functions"][stage]]), "part", "exec")
    assert 4 * len(block["sites"]) + len(outside["sites"]) == 9
    # What the document describes as fields is all there is.
    text = (Path(__file__).parent.parent / "docs" / "inspector.md").read_text()
    fields = {*document, *block, *block["sites"][0], *block["flow"]["traced"]}
    assert [name for name in fields if f"`{name}`" not in text] == []


@needs_dot
def test_a_block_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "block.svg"
    options = ("--method", "int8", "--min-features", "1", "--ignored-layers", "img_mod")
    model = ("QwenImageTransformer2DModel:tiny", "--format", "svg", "--out", str(file))
    assert dump(capsys, *model, *options)[0] == 0
    root = ElementTree.parse(file).getroot()
    fills = [node.get("fill") for node in root.iter() if node.get("fill")]
    # Of 14 products one is kept; each colour is once more in the legend. q, k and v share.
    counted = {kind: fills.count(LOOKS[kind].fill) - 1 for kind in ("low", "kept", "quantize")}
    assert counted == {"low": 13, "kept": 1, "quantize": 9}
    assert fills.count(LOOKS["attention"].fill) - 1 == 1
    # A block of some 250 operations is drawn in few nodes.
    assert fills.count(LOOKS["other"].fill) - 1 < 20
    words = "".join(root.itertext())
    for word in ("low-precision GEMM", "attn.to_q", "scaled_dot_product_attention", "192 to 768"):
        assert word in words


@needs_dot
def test_a_drawing_holds_any_name() -> None:
    class Block(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.add_module(name, nn.Linear(38, 38))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(getattr(self, self.name)(x))

    name = "<script>alert('x')</script>&\\n\"\x07"
    model = nn.Sequential(Block(name), Block(name)).requires_grad_(False)
    options = {"method": "int8", "min_features": 1, "compiler": "eager"}
    found = inspect("</svg>", model, (torch.randn(5, 38),), options)
    root = ElementTree.fromstring(render_svg(found, "quantized"))
    assert not any(node.tag.endswith("script") for node in root.iter())
    words = "".join(root.itertext())
    assert name.replace("\x07", " ") in words
    assert "</svg>, quantized" in words


def test_a_flow_has_no_cycle_and_every_product() -> None:
    options = {"method": "int8", "min_features": 1, "compiler": "eager"}
    inputs = (torch.randn(2, 7, 38), torch.randn(26))
    found = inspect("model", Model((70, 54, 70)), inputs, options)
    assert len(found.parts) == 3
    for part in found.parts:
        for stage, kind in (("traced", "kept"), ("quantized", "low")):
            flow: Flow = part.flow[stage]
            assert sum(node.kind == kind for node in flow.nodes) == len(part.sites)
            waiting = {place: 0 for place in range(len(flow.nodes))}
            for _, head in flow.edges:
                waiting[head] += 1
            ready = [place for place, count in waiting.items() if not count]
            seen = 0
            while ready:
                seen += 1
                place = ready.pop()
                for tail, head in flow.edges:
                    if tail == place:
                        waiting[head] -= 1
                        ready += [head] if not waiting[head] else []
            assert seen == len(flow.nodes)


def test_without_dot_the_error_says_what_to_install(
    mine: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    code, out, err = dump(capsys, f"{mine}:model", *QUICK, "--format", "svg")
    assert (code, out) == (2, "")
    assert "apt-get install graphviz" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, ["a scheduler, and not of a"]),
        ({"_class_name": "AutoencoderKLQwenImage"}, ["an autoencoder, and not of a transformer"]),
        ({"_class_name": "QwenImageTransformer2DModl"},
         ["Did you mean 'QwenImageTransformer2DModel'?", "module:function"]),
        ({"_class_name": "PixArtTransformer2DModel"},
         ["inputs cannot be made up for", "PixArtTransformer2DModel is a class of diffusers that",
          "do not know. Valid: QwenImage"]),
        ({"architectures": ["T5EncoderModel"]}, ["has no _class_name"]),
        (CONFIG | {"num_layer": 3}, ["no setting 'num_layer'", "Did you mean 'num_layers'?"]),
        (CONFIG | {"attention_head_dim": "x"}, ["cannot be built from this configuration"]),
        ([1, 2], ["does not hold a JSON object"]),
        ("{", ["cannot be read: "]),
        (None, ["no folder or configuration"]),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_named(
    text: object, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text if isinstance(text, str) else json.dumps(text))
    code, out, err = dump(capsys, str(file), *QUICK)
    assert (code, out) == (2, "")
    assert [word for word in ["omniq dump: error: ", str(file), *words] if word not in err] == []
    assert "Traceback" not in err


def test_a_pipeline_without_a_transformer_lists_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = {"_class_name": "P", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    code, _, err = dump(capsys, str(tmp_path), *QUICK)
    assert code == 2
    assert "names no transformer that omniq knows, but unet (U), vae (V)" in err


def test_a_function_that_fails_shows_its_own_traceback(
    mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = dump(capsys, f"{mine}:fails", *QUICK)
    assert code == 2
    assert "KeyError: 'a key of mine'" in err
    assert f'{mine}.py", line ' in err
    assert "omniq_compile" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "svg", "--stage", "kernels"], ["draws one stage, traced or quantized"]),
        (["--format", "svg", "--stage", "lowered"], ["and not lowered", "text or html"]),
        (["--format", "html", "--diff"], ["--diff is for --format text"]),
        (["--diff", "--stage", "kernels"], ["cannot compare traced with kernels"]),
        (["--diff", "--stage", "traced"], ["cannot compare traced with traced"]),
        (["--layer", "re:("], ["--layer pattern 're:(' is not a regular expression"]),
        (["--target", ""], ["unknown target device ''", "Valid: cpu"]),
        (["--layer", "blocks.0.upp"], ["--layer 'blocks.0.upp' names no layer", "blocks.0.up"]),
        (["--out", "missing/page.html", "--format", "html"], ["cannot write", "No such file"]),
    ],
)
def test_what_does_not_go_together_is_said(
    mine: str, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = dump(capsys, f"{mine}:model", *QUICK, *arguments)
    assert (code, out) == (2, "")
    assert [word for word in words if word not in err] == []


@pytest.mark.parametrize("arguments", [["--stage", "loweredd"], ["--format", "pdf"]])
def test_an_unknown_stage_or_format_lists_the_valid_ones(
    mine: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["dump", f"{mine}:model", *QUICK, *arguments])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "invalid choice" in err
    assert ("lowered" if "--stage" in arguments else "html") in err


def test_the_page_files_are_in_the_package() -> None:
    listed = [file.name for file in files("omniq_compile.inspector").iterdir()]
    for name in ("page.html.j2", "page.css", "page.js"):
        assert name in listed
        text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
        assert f'"{name}"' in text
