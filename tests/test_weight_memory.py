"""The memory of a quantized weight is that of its parts: shared, exported, pickled."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import omniq_compile as omniq
from omniq_compile import WeightError


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
