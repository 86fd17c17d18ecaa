"""The documentation: its site builds, what it shows runs, and its tables are those of the code."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from code_blocks import FENCE, blocks

import omniq_compile as omniq
from omniq_compile.cli import COMMANDS, main
from omniq_compile.lowering.schemes import METHODS
from omniq_compile.models.random_models import random_model
from omniq_compile.passes.option_checks import CHECKS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands(path: Path) -> list[list[str]]:
    """Return the command lines of a page: indented ones, and those in shell blocks."""
    text = path.read_text("utf-8")
    indented = re.findall(r"^    (\S.*)$", FENCE.sub("", text), re.M)
    shell = [line for kind in ("sh", "bash", "shell") for code in blocks(path, kind)
             for line in code.replace("\\\n", " ").splitlines()]  # fmt: skip
    lines = [shlex.split(line, comments=True) for line in [*indented, *shell] if "'" not in line
             or line.count("'") % 2 == 0]  # fmt: skip
    known = ("omniq", "make", "python", "pip", "pytest")
    return [words for words in lines if words and words[0] in known]


def with_python() -> list[Path]:
    return [path for path in PAGES if blocks(path, "python")]


def make_folder(folder: Path) -> None:
    """Write a pipeline with a transformer, a text encoder and a VAE that is only named.

    The transformer's weights are beside the folder too, as a single file.
    """
    shutil.copytree(ROOT / "examples/digits/pipeline", folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    shutil.copy(weights, folder.parent / "qwen_image_bf16.safetensors")
    config = transformers.T5Config(
        vocab_size=32, d_model=256, d_kv=64, d_ff=256, num_layers=1, num_heads=4
    )
    transformers.T5EncoderModel(config).bfloat16().save_pretrained(folder / "text_encoder")
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text("{}")
    (folder / "vae/model.safetensors").touch()
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": ["transformers", "T5EncoderModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "_class_name": "DiffusionPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("page", with_python(), ids=name)
def test_every_python_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, as a reader types them, with tiny models where a page takes one for granted."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "a/diffusers-folder")

    def tiny() -> Any:
        return random_model("QwenImageTransformer2DModel", width=256, num_blocks=2)

    def from_pretrained(folder: str, **arguments: Any) -> Any:
        assert Path(folder).is_dir()
        return SimpleNamespace(**({"transformer": tiny()} | arguments))

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    space: dict[str, Any] = {"torch": torch, "omniq_compile": omniq, "__name__": "page"}
    space |= {"transformer": tiny(), "model": tiny()}
    config = torch._dynamo.config
    # Put back what a page sets for the whole process.
    with config.patch(recompile_limit=config.recompile_limit):
        for code in blocks(page, "python"):
            exec(compile(code, name(page), "exec"), space)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_line_can_be_typed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for command in COMMANDS:
        monkeypatch.setattr(import_module(f"omniq_compile.cli.{command}"), "run", lambda parsed: 0)
    for program, *arguments in commands(page):
        if program == "omniq":
            assert main(arguments) == 0
        elif program == "make":
            assert arguments[0] in targets
        elif program == "python":
            assert (ROOT / arguments[0]).is_file()
        elif program == "pip":
            wanted = re.findall(r"(?:omniq-compile|\.)\[(\w+)\]", " ".join(arguments))
            assert set(wanted) <= set(extras)


def test_the_pages_have_code_and_commands() -> None:
    """What the tests above find in the pages is not nothing."""
    readme = ROOT / "README.md"
    assert len(blocks(readme, "python")) == 3
    assert {words[0] for words in commands(readme)} >= {"omniq", "make"}
    assert {words[1] for words in commands(readme) if words[0] == "omniq"} >= {"dump", "plan"}


def test_the_readme_has_every_option() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert sorted(set(rows) & set(CHECKS)) == sorted(CHECKS)


def test_the_site_builds_without_a_warning_and_holds_the_tables(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    hardware = (tmp_path / "hardware.html").read_text("utf-8")
    missing = [row for row in omniq.kernels() if row.kernel not in hardware]
    assert missing == []
    for method in METHODS:
        page = (tmp_path / f"{method}.html").read_text("utf-8")
        assert [
            row.target for row in omniq.kernels() if f"<code>{row.target}</code>" not in page
        ] == []
        assert "<!-- table" not in page
    options = (tmp_path / "options.html").read_text("utf-8")
    assert [option for option in CHECKS if f"<code>{option}</code>" not in options] == []
    python = (tmp_path / "api.html").read_text("utf-8")
    names = [name for name in omniq.__all__ if name != "__version__"]
    assert [name for name in names if f"<code>{name}" not in python] == []
    for file in tmp_path.rglob("*.html"):
        loaded = re.findall(r'(?:src|<link[^>]*href)="(https?://[^"]+)"', file.read_text("utf-8"))
        assert loaded == [], f"{file.name} loads from the network"
