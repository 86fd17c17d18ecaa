"""A folder that is replaced is the old one or the new one, whole, wherever the writing stops."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniq_compile import CheckpointError
from omniq_compile.checkpoints.written_folder import MODEL, PIPELINE, write_aside

FILES = ("config.json", "model.safetensors")


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in FILES:
            (folder / name).write_text(text)

    return write


def contents(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in FILES]


class Interruption:
    """Raises once, before or after the n-th time that a folder is renamed or removed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, after: bool, error: Any) -> None:
        self.left, self.after, self.error = step, after, error
        self.happened = False
        monkeypatch.setattr(Path, "rename", self.around(Path.rename))
        monkeypatch.setattr(shutil, "rmtree", self.around(shutil.rmtree))

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            now = self.left == 0
            self.left -= 1
            if now:
                self.happened = True
                if self.after:
                    function(path, *arguments, **options)
                elif function.__name__ == "rmtree":
                    # What was removed by then: one file, the first.
                    next((p for p in sorted(path.rglob("*")) if p.is_file()), path / "x").unlink(
                        missing_ok=True
                    )
                raise self.error
            return function(path, *arguments, **options)

        return call


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_whatever_stops_a_replacement_leaves_one_whole_folder(
    error: BaseException, after: bool, tmp_path: Path
) -> None:
    for step in itertools.count():
        place = tmp_path / str(step)
        folder = place / "out"
        write_aside(folder, writer("old"), MODEL)
        with pytest.MonkeyPatch.context() as monkeypatch:
            interruption = Interruption(monkeypatch, step, after, error)
            try:
                write_aside(folder, writer("new"), MODEL, overwrite=True)
                assert contents(folder) == ["new", "new"]
            except (KeyboardInterrupt, OSError, CheckpointError):
                assert contents(folder) in (["old", "old"], ["new", "new"]), step
        assert [path.name for path in place.iterdir()] == ["out"], step
        if not interruption.happened:
            break
    assert step >= 3  # two renames and a removal, at least


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def write(aside: Path) -> None:
        code = f"""
from pathlib import Path
from omniq_compile.checkpoints.written_folder import MODEL, write_aside
write_aside(Path({str(folder)!r}), lambda aside: (aside / "a").write_text("other"), MODEL)
"""
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode == 1
        assert f"CheckpointError: {folder} is being written by another process." in other.stderr
        writer("first")(aside)

    write_aside(folder, write, MODEL)
    assert contents(folder) == ["first", "first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_folder_that_cannot_be_put_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "out", Path.rename
    write_aside(folder, writer("old"), MODEL)

    def refuse(path: Path, target: Path) -> Path:
        if target == folder:
            raise OSError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="The old one is whole, in ") as raised:
        write_aside(folder, writer("new"), MODEL, overwrite=True)
    (old,) = tmp_path.glob(".out.old.*/out")
    assert str(old) in str(raised.value)
    assert contents(old) == ["old", "old"]


@pytest.mark.parametrize("inside", ["", "new", "new/model"])
def test_a_file_is_never_replaced(inside: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out is a file\. Remove it, or choose another"):
        write_aside(tmp_path / "out" / inside, writer("new"), MODEL, overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that none can be made in")
@pytest.mark.parametrize("folder", ["/proc/new", "/proc/new/model"])
def test_a_place_that_takes_no_folder(folder: str) -> None:
    words = r"^cannot write /proc/new.*: .*\. Nothing was left\. Choose another folder\.$"
    with pytest.raises(CheckpointError, match=words):
        write_aside(Path(folder), writer("new"), MODEL)


@pytest.mark.parametrize("folder", [".", "/"])
def test_a_folder_without_a_name_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="has no name"):
        write_aside(Path(folder), writer("new"), MODEL, overwrite=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_the_folder_that_it_names_is_made(there: bool, tmp_path: Path) -> None:
    """Such as one to a larger disk."""
    large = tmp_path / "large" / "quantized"
    if there:
        large.mkdir(parents=True)
        (large / MODEL).touch()
    link = tmp_path / "link"
    link.symlink_to(large)
    write_aside(link, lambda folder: (folder / "new").touch(), MODEL, overwrite=True)
    assert link.is_symlink()
    assert [file.name for file in large.iterdir()] == ["new"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"large", "link"}


@pytest.mark.parametrize(
    ("there", "kind", "words"),
    [
        (["model_index.json", "vae/a"], MODEL, "holds a whole pipeline, and .* to write one model"),
        (["model_index.json", "config.json"], MODEL, "holds a whole pipeline"),
        (["config.json"], PIPELINE, "holds one model, and .* to write a whole pipeline"),
        (["photos/a"], PIPELINE, "holds no model, and all of it would be deleted"),
        (["photos/a"], MODEL, "holds no model, and all of it would be deleted"),
    ],
)
def test_what_is_of_another_kind_is_never_replaced(
    there: list[str], kind: str, words: str, tmp_path: Path
) -> None:
    for name in there:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=words):
        write_aside(tmp_path / "out", lambda _: pytest.fail("written"), kind, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [MODEL, PIPELINE])
def test_what_is_of_the_same_kind_is_replaced(kind: str, tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_aside(
            tmp_path / "out", lambda f, t=text: (f / kind).write_text(t), kind, overwrite=True
        )
    assert (tmp_path / "out" / kind).read_text() == "new"
