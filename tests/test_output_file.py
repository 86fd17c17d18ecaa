"""A result that cannot be written is one line and code 2, before any work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_interrupted import files_of_at_most

from omniq_compile.cli import main
from omniq_compile.cli.picture_file import save_result
from omniq_compile.cli.sound_file import save_sound
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.output_file import check_writable, write
from omniq_compile.pipelines.sound import Sound

COMMANDS = (
    ["dump", "QwenImageTransformer2DModel:tiny", "--method", "int8", "--out"],
    ["plan", "QwenImageTransformer2DModel:tiny", "--method", "int8", "--out"],
    ["bench", "--quick", "--json"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: str(c[0]))
@pytest.mark.parametrize(
    ("where", "why"),
    [
        (".", "Is a directory"),
        ("missing/result", "No such file or directory"),
        ("file/result", "Not a directory"),
        ("closed/result", "Permission denied"),
        ("closed-file", "Permission denied"),
    ],
)
def test_each_command_refuses_before_it_works(
    command: list[str],
    where: str,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("closed").mkdir(mode=0o500)
    Path("closed-file").touch(mode=0o400)
    if where.startswith("closed") and os.geteuid() == 0:
        # Root may write everywhere: the system's answer to anyone else.
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("closed"))
    assert main([*command, where]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.strip() == (
        f"omniq {command[0]}: error: {command[-1]}: cannot write '{where}': {why}."
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs a full device and /proc")
@pytest.mark.parametrize(
    ("file", "why"),
    [("/dev/full", "No space left on device"), ("/proc/result", "No such file or directory")],
)
def test_what_the_system_refuses_while_writing_is_said(file: str, why: str) -> None:
    check_writable("--out", Path(file))
    with pytest.raises(OmniqError, match=f"^--out: cannot write '{file}': {why}.$"):
        write("--out", Path(file), "text")


def test_a_result_is_written_over_an_older_one(tmp_path: Path) -> None:
    file = tmp_path / "result"
    file.write_text("older and longer")
    check_writable("--out", file)
    write("--out", file, "déjà")
    assert file.read_bytes() == "déjà".encode()


NOISE = np.random.default_rng(0).random((1, 5, 64, 64, 3), dtype=np.float32)


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on this system")
@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("x.json", lambda file: write("--out", file, "longer than the limit" * 200)),
        ("x.png", lambda file: save_result(SimpleNamespace(images=NOISE[0, :1]), file)),
        ("x.gif", lambda file: save_result(SimpleNamespace(frames=NOISE), file)),
        ("x.wav", lambda file: save_sound(Sound([NOISE.reshape(-1, 1)], 8000), file)),
    ],
)
def test_a_failed_write_leaves_what_was_there(
    name: str, save: Callable[[Path], object], tmp_path: Path
) -> None:
    file = tmp_path / name
    for before in ([], ["older"]):
        for text in before:
            file.write_text(text)
        with files_of_at_most(1024), pytest.raises(OmniqError, match="File too large"):
            save(file)
        assert [path.read_text() for path in tmp_path.iterdir()] == before
    save(file)
    assert file.stat().st_size > 1024
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_a_link_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write("--out", tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write("--out", tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
