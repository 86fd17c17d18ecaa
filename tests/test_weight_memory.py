"""The memory of a quantized weight is that of its parts: shared, exported, marked, pickled."""

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
from torch.utils._python_dispatch import TorchDispatchMode

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

def share(what):
    layer = nn.Linear(32, 8)
    omniq.quantize_(layer, {"method": "mxfp4", "min_features": 1})
    before = layer.weight.dequantize()
    assert not layer.weight.is_shared()
    if what == "model that is referred to":
        Cycle(layer.weight)
    layer.weight.share_memory_() if what == "weight" else layer.share_memory()
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
    print(what, layer.weight.codes.unique().tolist(), flush=True)

gc.disable()
for what in sys.argv[1:]:
    share(what)
"""


def test_shared_parts_are_one_memory_for_two_processes() -> None:
    ways = ("weight", "model", "model that is referred to")
    assert run_python(SHARE, *ways).splitlines() == [f"{way} [17]" for way in ways]


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


class Device(TorchDispatchMode):
    """Stands in for a device with streams and pinned memory, of which this machine has none.

    What is not about memory goes on as it is.
    """

    def __init__(self, pinned: tuple[torch.Tensor, ...] = ()) -> None:
        super().__init__()
        self.pinned = pinned
        self.recorded: list[tuple[torch.Tensor, torch.Stream]] = []
        self.copied: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(args[0], QuantizedTensor):
            return NotImplemented  # its own answer comes next, and calls this for the parts
        match func:
            case torch.ops.aten.record_stream.default:
                self.recorded.append(args)
                return None
            case torch.ops.aten.is_pinned.default:
                return any(args[0] is tensor for tensor in self.pinned)
            case torch.ops.aten._pin_memory.default:
                self.copied.append(args[0])
                return args[0].clone()
        return func(*args, **(kwargs or {}))


def test_recording_a_stream_marks_the_parts_and_writes_nothing() -> None:
    q = omniq.quantize(torch.randn(8, 40), "int8")
    versions = [part._version for part in q.parts]
    stream = torch.Stream(device="cpu")
    with Device() as device:
        assert q.record_stream(stream) is None
        nn.Parameter(q, requires_grad=False).data.record_stream(stream)
    assert [id(tensor) for tensor, _ in device.recorded] == 2 * [id(part) for part in q.parts]
    assert all(recorded == stream for _, recorded in device.recorded)
    assert [part._version for part in q.parts] == versions


def test_pinned_are_those_whose_parts_are() -> None:
    q = omniq.quantize(torch.randn(8, 40), "int8")
    for pinned in ((), q.parts[:1], q.parts[1:], q.parts):
        with Device(pinned) as device:
            assert q.is_pinned() == (len(pinned) == 2)
            again = q.pin_memory()
        assert type(again) is QuantizedTensor
        assert torch.equal(again.dequantize(), q.dequantize())
        # PyTorch copies nothing that is pinned already.
        assert len(device.copied) == (0 if len(pinned) == 2 else 2)


def test_the_same_memory_is_that_of_the_same_parts() -> None:
    q = omniq.quantize(torch.randn(8, 40), "int8")
    assert q.is_set_to(q.detach())
    assert not q.is_set_to(q.clone())
    assert not q.is_set_to(q.dequantize())
    assert not q.dequantize().is_set_to(q)
    # The codes and scales of one format are some of another's, which are other values.
    both = omniq.quantize(torch.randn(8, 40), "mxfp4_dualscale")
    fine = QuantizedTensor(both.parts[:2], "mxfp4", "mxfp4", both.shape, both.dtype)
    assert not fine.is_set_to(both)
    assert not torch.equal(fine.dequantize(), both.dequantize())


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.resize_(2, 2),
        lambda q: q.resize_as_(torch.ones(2, 2)),
        lambda q: q.set_(),
        lambda q: q.set_(torch.ones(8, 8)),
        lambda q: q.set_(torch.ones(8, 8).untyped_storage()),
        lambda q: torch.ones(8, 8).set_(q),
        lambda q: q.t_(),
        lambda q: q.squeeze_(0),
        lambda q: q.unsqueeze_(0),
        lambda q: q.as_strided_((2, 2), (1, 1)),
    ],
)
def test_changing_memory_or_shape_in_place_is_refused(change: Any) -> None:
    q = omniq.quantize(torch.randn(8, 8), "int8")
    before = q.dequantize()
    with pytest.raises(WeightError, match=r"stored as int8 has neither.*\.dequantize\(\)"):
        change(q)
    assert torch.equal(q.dequantize(), before)


def test_detaching_in_place_leaves_the_parts() -> None:
    q = omniq.quantize(torch.randn(8, 40), "int8")
    versions = [part._version for part in q.parts]
    assert q.detach_() is q
    assert [part._version for part in q.parts] == versions
    plain = torch.ones(1).resize_as_(q)
    assert plain.shape == q.shape


LOAD = """
import sys
import omniq_compile
import torch

for weight in torch.load(sys.argv[1]).values():
    torch.save([weight.dequantize(), *weight.parts], f"{sys.argv[2]}.{weight.method}")
    print(type(weight).__name__, weight.method, weight.format, weight.dtype)
"""


def test_torch_load_reads_a_saved_weight_by_default(tmp_path: Path) -> None:
    weight = torch.randn(8, 40, dtype=torch.bfloat16)
    weights = {method: omniq.quantize(weight, method) for method in ("int8", "mxfp4")}
    saved, read = tmp_path / "saved.pt", tmp_path / "read.pt"
    torch.save(weights, saved)
    printed = run_python(LOAD, str(saved), str(read)).splitlines()
    for line, (method, q) in zip(printed, weights.items(), strict=True):
        assert line == f"QuantizedTensor {method} {q.format} torch.bfloat16"
        tensors = torch.load(f"{read}.{method}")
        for tensor, expected in zip(tensors, [q.dequantize(), *q.parts], strict=True):
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
