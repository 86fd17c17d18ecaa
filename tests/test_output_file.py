"""A result that cannot be written is one line and code 2, before any work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from omniq_compile.cli import main
from omniq_compile.cli.output_file import check_writable, write
from omniq_compile.lowering.errors import OmniqError

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
