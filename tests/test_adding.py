"""A method and a device that are added by the steps of docs/adding.md, in a copy of omniq."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What is replaced in which file, as the document says.
METHOD = {
    "lowering/formats/__init__.py": [
        ("import fp8, int8, mxfp4", "import fp8, int4, int8, mxfp4"),
        ("        int8.FORMAT,", "        int8.FORMAT,\n        int4.FORMAT,"),
    ],
    "lowering/schemes.py": [
        ('"int8": _same("int8"),', '"int8": _same("int8"),\n    "int4": _same("int4"),'),
    ],
    "lowering/emulated.py": [("ELEMENTS = {", 'ELEMENTS = {"int4": "s4", ')],
    "benchmark/gemm.py": [("PEAK_OF = {", 'PEAK_OF = {"int4": "int8", ')],
}
DEVICE = {
    "lowering/target.py": [
        ('    "xpu": ("xe",),', '    "xpu": ("xe",),\n    "mps": ("m4", "m1"),'),
        ("_DETECT = {", '_DETECT = {\n    "mps": lambda: Target("mps", "m4"),'),
    ],
}
KERNELS = """
from omniq_compile.lowering import emulated
from omniq_compile.lowering.target import ARCHITECTURES

_ALL = ARCHITECTURES["mps"]
KERNELS = (
    emulated.int8("mps", _ALL, "no s8 arithmetic on mps"),
    *emulated.kernels("mps", _ALL, "mps"),
)
"""
CHECK = """
import torch
import omniq_compile as omniq
from omniq_compile.cli import main
from omniq_compile.lowering.schemes import METHODS
from omniq_compile.lowering.target import ARCHITECTURES

def rounded(x):
    scale = x.double().abs().amax(-1, keepdim=True) / 7
    return torch.round(x.double() / scale) * scale

def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())

torch.manual_seed(0)
for N, K in ((40, 48), (300, 321)):
    for target in ("cpu", "cpu:generic"):
        layer = torch.nn.Linear(K, N).requires_grad_(False)
        x = torch.randn(7, K)
        expected = rounded(x) @ rounded(layer.weight).T + layer.bias.double()
        options = {"method": "int4", "min_features": 1, "compiler": "aot_eager", "target": target}
        torch._dynamo.reset()
        found = torch.compile(layer, backend="omniq", options=options)(x)
        assert error(found, expected) < 1e-6, (N, K, target)
        assert error(found, layer(x).double()) > 1e-2
for device, archs in ARCHITECTURES.items():
    for arch in archs:
        for method in METHODS if device == "mps" else ["int4"]:
            options = {"method": method, "min_features": 1}
            if method == "mxfp4_dualscale":
                options["num_bf16_fallback_layers"] = 0
            layer = torch.nn.Linear(48, 40).requires_grad_(False)
            report = omniq.explain(layer, [torch.randn(4, 48)], options, target=f"{device}:{arch}")
            (site,) = report.sites
            assert site.decision.kernel, (device, arch, method)
assert main(["kernels", "--target", "mps:m1"]) == 0
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    package = tmp_path / "omniq_compile"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "omniq_compile", package, ignore=ignore)
    for floor in ("passes", "lowering"):
        shutil.copytree(ROOT / floor, package / floor, ignore=ignore)
    return package


def test_the_steps_are_all_that_it_takes(copied: Path, tmp_path: Path) -> None:
    formats = copied / "lowering" / "formats"
    text = (formats / "int8.py").read_text()
    text = text.replace("CODE_MAX = 127", "CODE_MAX = 7").replace('name="int8"', 'name="int4"')
    (formats / "int4.py").write_text(text)
    (copied / "lowering" / "mps").mkdir()
    (copied / "lowering" / "mps" / "__init__.py").write_text(KERNELS)
    for file, edits in {**METHOD, **DEVICE}.items():
        text = (copied / file).read_text()
        for old, new in edits:
            assert text.count(old) == 1, (file, old)
            text = text.replace(old, new)
        (copied / file).write_text(text)
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "int4" in done.stdout
