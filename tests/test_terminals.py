"""The command line where its output is cut off, interrupted, or has no letters for a name."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from omniq_compile.cli import main


@pytest.mark.skipif(sys.platform == "win32", reason="no pipe of this kind on this system")
def test_a_reader_that_leaves_is_no_error() -> None:
    """As `| head -1` does, before the command writes."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "omniq_compile", "--version"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ran = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=buffered, text=True, check=False
    )
    os.close(write)
    assert (ran.returncode, ran.stderr) == (1, "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a full device")
def test_a_full_disk_under_what_is_printed_is_one_line() -> None:
    """As `omniq dump ... > FILE` has it."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "omniq_compile", "kernels"]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == (
        "omniq kernels: error: [Errno 28] No space left on device. Make room, or write elsewhere.\n"
    )


def test_a_shell_that_closed_the_output_gets_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``>&-`` does: Python then has no stdout."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["kernels", "--target", "abacus"]) == 2
    assert "omniq kernels: error: unknown" in capsys.readouterr().err


def test_an_interrupt_while_a_command_is_imported_is_one_line() -> None:
    code = (
        "import signal, sys; import omniq_compile.cli as cli;"
        # What runs the tests in the background may have it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "cli.import_module = lambda name: signal.raise_signal(signal.SIGINT);"
        "sys.exit(cli.main(['dump', 'x', '--method', 'int8']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (130, "omniq dump: interrupted\n")


def test_a_terminal_without_the_letters_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 40 columns the words of `omniq kernels` were cut, by a letter that ASCII lacks."""
    monkeypatch.setenv("COLUMNS", "40")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["kernels"]) == 0
    printed = written.getvalue().decode("ascii")
    assert "cpu:avx512_vnni" in printed
    assert "\\u" not in printed
    print("größe")
    sys.stdout.flush()
    assert written.getvalue().endswith(rb"gr\xf6\xdfe" + b"\n")
