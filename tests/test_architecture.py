"""The three floors: lower ones never import from higher ones, and files stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import omniq_compile

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("lowering", "passes", "omniq_compile")
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
LONGEST = 400

# Put together here, so that this file does not hold what it looks for.
PRIVATE = [f"/{folder}/" for folder in ("work", "root", "home/user")] + ["/tmp" + "/env"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package(path: Path) -> str:
    """Name the installed package that a source file's folder is."""
    folder = relative(path.parent).replace("/", ".")
    return folder if folder.startswith("omniq_compile") else f"omniq_compile.{folder}"


def imported(source: str, inside: str) -> set[str]:
    """Return the dotted names that a module imports, wherever in it, and by text too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                base = inside.split(".")[: len(inside.split(".")) - node.level + 1]
                origin = ".".join([*(base if node.level else []), *filter(None, [node.module])])
                found |= {f"{origin}.{alias.name}" for alias in node.names}
            case ast.Constant(value=str(text)) if text.startswith("omniq_compile."):
                found.add(text)
    return found


def climbs(name: str, floor: str) -> bool:
    """Say whether a name stands on a higher floor than ``floor``."""
    if name.split(".")[0] not in FLOORS:
        return False
    if name.startswith(("omniq_compile.lowering", "lowering")):
        return False
    if name.startswith(("omniq_compile.passes", "passes")):
        return floor == "lowering"
    return floor != "omniq_compile"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_imports_from_a_higher_floor(path: Path) -> None:
    floor = relative(path).split("/")[0]
    names = imported(path.read_text(encoding="utf-8"), package(path))
    assert sorted(name for name in names if climbs(name, floor)) == []


def test_only_the_command_line_imports_the_command_line() -> None:
    cli = ROOT / "omniq_compile" / "cli"
    found = [
        (relative(path), name)
        for path in SOURCES
        if cli not in path.parents and path != ROOT / "omniq_compile" / "__main__.py"
        for name in imported(path.read_text(encoding="utf-8"), package(path))
        if f"{name}.".startswith("omniq_compile.cli.")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("floor", "line"),
    [
        ("lowering", "from omniq_compile.passes import match"),
        ("lowering", "from ..passes.match import find_sites"),
        ("lowering", "import omniq_compile.compiling.weights"),
        ("lowering", "from omniq_compile import explain"),
        ("lowering", "def f():\n    import_module('omniq_compile.passes.match')"),
        ("passes", "from omniq_compile.backend import omniq"),
        ("passes", "from omniq_compile import report"),
        ("passes", "from .. import summary"),
        ("passes", "import omniq_compile.cli.dump as dump"),
    ],
)
def test_the_scan_sees_every_way_to_climb(floor: str, line: str) -> None:
    names = imported(line, f"omniq_compile.{floor}")
    assert any(climbs(name, floor) for name in names)


@pytest.mark.parametrize(
    ("floor", "line"),
    [
        ("lowering", "from omniq_compile.lowering.formats import int8"),
        ("lowering", "from . import errors"),
        ("lowering", "import torch, operator"),
        ("passes", "from omniq_compile.lowering import registry"),
        ("passes", "from ..lowering import registry"),
        ("passes", "from .sites import Site"),
        ("omniq_compile", "from omniq_compile.backend import omniq"),
    ],
)
def test_the_scan_lets_the_same_and_lower_floors_pass(floor: str, line: str) -> None:
    names = imported(line, f"omniq_compile.{floor}" if floor != "omniq_compile" else floor)
    assert names
    assert not any(climbs(name, floor) for name in names)


def test_the_middle_floor_names_no_device_folder() -> None:
    devices = [p.name for p in (ROOT / "lowering").iterdir() if p.is_dir() and p.name != "formats"]
    assert "cpu" in devices
    for path in (ROOT / "passes").rglob("*.py"):
        names = imported(path.read_text(encoding="utf-8"), package(path))
        assert not any(f"lowering.{device}" in name for name in names for device in devices), path


def repository_files() -> list[Path]:
    """Return the files that git holds or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    files = [ROOT / name for name in names] or list(ROOT.rglob("*.*"))
    return [path for path in files if path.is_file()]


def test_every_python_file_is_under_400_lines() -> None:
    files = [path for path in repository_files() if path.suffix == ".py"]
    assert set(SOURCES) <= set(files)
    lengths = {relative(path): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines >= LONGEST} == {}


def test_no_file_holds_a_path_of_the_machine_it_was_written_on() -> None:
    found = []
    for path in repository_files():
        content = path.read_bytes()
        found += [(relative(path), text) for text in PRIVATE if text.encode() in content]
    assert found == []


def test_every_folder_of_source_is_installed() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = {package(path) for path in SOURCES}
    assert sorted(name for name in packages if f'"{name}"' not in pyproject) == []


# The folders whose files `docs/architecture.md` describes together.
TOGETHER = ("formats", "triton_kernels", "cpu", "cuda", "rocm", "xpu", "npu", "cli")


def described(folder: str) -> str:
    """Return what `docs/architecture.md` says of a folder: the part that its heading begins."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    parts = re.split(r"^##+ (.*)$", text, flags=re.MULTILINE)[1:]
    headed = zip(parts[::2], parts[1::2], strict=True)
    return "".join(part for heading, part in headed if f"`{folder}/`" in heading)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_the_architecture_names_each_file_under_its_folder(path: Path) -> None:
    if path.parent.name in TOGETHER:
        floor = relative(path).split("/")[0]
        assert f"`{path.parent.name}/`" in described(floor) + described(path.parent.name)
    elif not path.name.startswith("__"):
        name = re.escape(path.name)
        assert re.search(rf"`([\w/]+/)?{name}`", described(path.parent.name))


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == omniq_compile.__version__
