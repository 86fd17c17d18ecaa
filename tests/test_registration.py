"""When diffusers and transformers know omniq: each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tiny_flux import OPTIONS, tiny_flux

import omniq_compile as omniq
from omniq_compile.torch_logs import register

LOAD = """
from diffusers import FluxTransformer2DModel
print(type(FluxTransformer2DModel.from_pretrained({folder!r}).proj_out.weight).__name__)
"""
KNOWN = """
import sys
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as them
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as those
print(them["omniq"].__name__, those["omniq"].__name__)
print("waiting:", sum("registration" in type(finder).__module__ for finder in sys.meta_path))
"""


AGAIN = """
import importlib
import torch
import omniq_compile
from omniq_compile.compiling import own_backend
importlib.reload(own_backend)
model = torch.nn.Linear(320, 288).requires_grad_(False)
options = {"method": "int8", "compiler": "eager"}
arguments = own_backend.own_backend(lambda gm, inputs: gm)
print(torch.compile(model, **arguments)(torch.ones(2, 320)).shape)
print(len(omniq_compile.explain(model, torch.ones(2, 320), options).rewritten))
print([name for name in torch.compiler.list_backends() if "omniq" in name])
"""


def run(code: str, autoload: bool) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, path = tiny_flux(), tmp_path_factory.mktemp("stored")
    omniq.quantize_(model, OPTIONS)
    model.save_pretrained(path)
    return str(path)


EXPECTED = ["QuantizedTensor", "OmniqHfQuantizer", "OmniqQuantizer", "waiting:", "0"]


# The tests of both libraries' quantizers import omniq first too, in the tests' own process.
@pytest.mark.zoo
def test_an_import_before_the_libraries_registers_it(folder: str) -> None:
    ran = run(f"import omniq_compile\n{LOAD.format(folder=folder)}{KNOWN}", autoload=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == EXPECTED


def test_without_it_diffusers_says_so_and_an_import_afterwards_registers_it(folder: str) -> None:
    load = LOAD.format(folder=folder)
    refused = f"try:{textwrap.indent(load, '    ')}except ValueError as error:\n    print(error)\n"
    first = "import diffusers.quantizers.auto, transformers.quantizers.auto\n"
    ran = run(f"{first}{refused}print('now')\nimport omniq_compile\n{load}{KNOWN}", autoload=False)
    assert ran.returncode == 0, ran.stderr
    before, after = ran.stdout.split("now\n")
    assert "Unknown quantization type, got omniq" in before
    assert after.split() == EXPECTED


def test_torchs_own_entry_points_register_it_too_and_backends_are_loaded_again(folder: str) -> None:
    if "omniq" not in entry_points(group="torch.backends").names:
        pytest.skip("omniq is not installed here, only on the path")
    # A module of transformers is the first to import torch here, and with it omniq.
    first = "import transformers.quantizers.auto, transformers.modeling_utils\n"
    ran = run(first + LOAD.format(folder=folder) + KNOWN + AGAIN, autoload=True)
    assert ran.returncode == 0, ran.stderr
    *known, shape, rewritten, listed = ran.stdout.splitlines()
    assert " ".join(known).split() == EXPECTED
    assert (shape, rewritten, listed) == ("torch.Size([2, 288])", "1", "['omniq']")


def test_importing_omniq_imports_neither_library() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'accelerate'}"
    ran = run(f"import sys, omniq_compile; print(sorted({heavy} & set(sys.modules)))", False)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_a_library_that_lacks_what_is_used_is_imported_all_the_same(tmp_path: Path) -> None:
    """A diffusers of another version must not fail because omniq is installed."""
    for name in ("__init__", "quantizers/__init__", "quantizers/auto"):
        file = tmp_path / "diffusers" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import omniq_compile, torch; "
    ran = run(code + "import diffusers.quantizers.auto as a; print(a.__file__)", autoload=False)
    assert ran.stdout.strip().startswith(str(tmp_path)), ran.stderr
    assert "could not register with diffusers" in ran.stderr


def test_a_checkout_does_not_break_torch_of_an_environment_where_omniq_is_installed() -> None:
    root = Path(__file__).parents[1]
    # Without what an editable install adds, as where it was installed with `pip install .`.
    code = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import torch, omniq_compile.lowering, omniq_compile.passes
print(omniq_compile.lowering.__file__, omniq_compile.passes.__file__, sep="\\n")
"""
    environment = {n: v for n, v in os.environ.items() if n not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    expected = [root / "lowering" / "__init__.py", root / "passes" / "__init__.py"]
    assert [Path(line) for line in ran.stdout.split()] == expected
    assert "could not register" not in ran.stderr


def test_a_torch_that_differs_is_imported_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr("torch._logging._internal.register_log")
    with caplog.at_level("WARNING", logger="omniq"):
        register()
    assert "omniq could not register with torch" in caplog.text
    assert "register_log" in caplog.text
