"""The memory of a quantized weight is that of its parts: shared, exported, pickled."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_oracle import same_bits
from torch import nn

import omniq_compile as omniq
from omniq_compile import CheckpointError, QuantizedTensor, WeightError


def run_python(code: str, *arguments: str) -> str:
    """Run code in a process of its own, which may die of it, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout.strip()


SHARE = """
import gc, os, sys, weakref, torch, omniq_compile as omniq
from torch import nn

class Cycle:  # as Dynamo's guards hold weights, which then cannot be swapped
    def __init__(self, tensor):
        self.itself, self.seen = self, weakref.ref(tensor)

layer = nn.Linear(32, 8)
omniq.quantize_(layer, {"method": "mxfp4", "min_features": 1})
before = layer.weight.dequantize()
assert not layer.weight.is_shared()
gc.disable()
if sys.argv[1] == "model that is referred to":
    Cycle(layer.weight)
layer.weight.share_memory_() if sys.argv[1] == "weight" else layer.share_memory()
assert type(layer.weight) is omniq.QuantizedTensor
assert isinstance(layer.weight, nn.Parameter)
assert layer.weight.is_shared()
assert all(part.is_shared() for part in layer.weight.parts)
assert torch.equal(layer.weight.dequantize(), before)

child = os.fork()
if not child:
    layer.weight.codes.fill_(17)
    os._exit(0)
os.waitpid(child, 0)
print(layer.weight.codes.unique().tolist())
"""


@pytest.mark.parametrize("what", ["weight", "model", "model that is referred to"])
def test_shared_parts_are_one_memory_for_two_processes(what: str) -> None:
    assert run_python(SHARE, what) == "[17]"


def test_only_a_weight_whose_parts_are_all_shared_is_shared() -> None:
    q = omniq.quantize(torch.randn(8, 32), "int8")
    q.codes.share_memory_()
    assert not q.is_shared()
    q.scale.share_memory_()
    assert q.is_shared()


EXPORT = """
import numpy, torch, omniq_compile as omniq
from torch.utils.dlpack import to_dlpack

q = omniq.quantize(torch.randn(8, 40), "int8")
assert numpy.array_equal(numpy.from_dlpack(q), q.dequantize().numpy())
assert torch.equal(torch.from_dlpack(q), q.dequantize())
try:
    to_dlpack(q)
except RuntimeError as error:
    print("refused")
"""


def test_dlpack_hands_out_the_values() -> None:
    assert run_python(EXPORT) == "refused"
    q = omniq.quantize(torch.randn(8, 40), "int8")
    assert q.__dlpack_device__() == q.dequantize().__dlpack_device__()
    with pytest.raises(WeightError, match=r"copy=False.*\.dequantize\(\)"):
        np.from_dlpack(q, copy=False)


def test_it_has_no_address_of_its_own() -> None:
    """accelerate asks for it, and PyTorch's own deepcopy knows a wrapper by its zero."""
    q = omniq.quantize(torch.randn(8, 40), "int8")
    assert q.data_ptr() == nn.Parameter(q, requires_grad=False).data_ptr() == 0
    assert torch.equal(copy.deepcopy(q).dequantize(), q.dequantize())


LOAD = """
import sys
import omniq_compile
import torch

weight = torch.load(sys.argv[1])["weight"]
torch.save([weight.dequantize(), *weight.parts], sys.argv[2])
print(type(weight).__name__, weight.method, weight.format, weight.dtype)
"""


@pytest.mark.parametrize("method", ["int8", "mxfp4"])
def test_torch_load_reads_a_saved_weight_by_default(method: str, tmp_path: Path) -> None:
    q = omniq.quantize(torch.randn(8, 40, dtype=torch.bfloat16), method)
    saved, read = tmp_path / "saved.pt", tmp_path / "read.pt"
    torch.save({"weight": q}, saved)
    printed = run_python(LOAD, str(saved), str(read))
    assert printed == f"QuantizedTensor {method} {q.format} torch.bfloat16"
    for tensor, expected in zip(torch.load(read), [q.dequantize(), *q.parts], strict=True):
        assert same_bits(tensor, expected)


def test_without_entry_points_a_use_of_the_class_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved.pt"
    torch.save({"weight": omniq.quantize(torch.randn(8, 40), "int8")}, saved)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    code = LOAD.replace("import torch\n", "import torch\nomniq_compile.QuantizedTensor\n")
    assert run_python(code, str(saved), str(tmp_path / "read.pt")).startswith("QuantizedTensor")


def test_a_pickled_module_keeps_its_parameter() -> None:
    layer = nn.Linear(32, 8)
    omniq.quantize_(layer, {"method": "int8", "min_features": 1})
    again = pickle.loads(pickle.dumps(layer))
    assert type(again.weight) is QuantizedTensor
    assert isinstance(again.weight, nn.Parameter)
    assert torch.equal(again.weight.dequantize(), layer.weight.dequantize())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda q: setattr(q, "codes", q.codes[:4]), "do not fit int8: [([4, 40], torch.int8)"),
        (lambda q: setattr(q, "scale", q.scale.double()), "torch.float64)]. Save it again"),
        (lambda q: delattr(q, "scale"), "is damaged: KeyError('scale')"),
        (lambda q: setattr(q, "format", "int9"), "unknown format 'int9'"),
        (lambda q: setattr(q, "codes", 5), "'int' object has no attribute"),
    ],
)
def test_a_damaged_pickle_is_refused(damage: Any, words: str, tmp_path: Path) -> None:
    q = omniq.quantize(torch.randn(8, 40), "int8")
    damage(q)
    torch.save(q, tmp_path / "damaged.pt")
    with pytest.raises(CheckpointError) as raised:
        torch.load(tmp_path / "damaged.pt")
    assert words in str(raised.value)
