"""Help, and a path that is wrong, do not wait for diffusers, which takes seconds to import."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import argparse
import sys
from importlib import import_module

from omniq_compile.cli import COMMANDS, main

for command in COMMANDS:
    import_module(f"omniq_compile.cli.{command}").add_arguments(argparse.ArgumentParser())
    print(command, "diffusers" in sys.modules)
how = ["--quantization", "int8"]
goal = ["--method", "int8", "--max-bytes", "1"]
for command, *more in ("generate",), ("compare", *how), ("tune", *goal), ("quantize", *how):
    main([command, "/nowhere", *more, "--out", "out.png"])
    print(command, "diffusers" in sys.modules)
"""


def test_no_command_imports_diffusers_for_its_arguments() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8 + 4
    assert [line for line in lines if line.endswith("True")] == []
    assert done.stderr.count("error: /nowhere is not a folder, and no hub id") == 4
