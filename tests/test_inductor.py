"""What Inductor is told, and what it keeps from one compile to the next."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import sympy
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.choices import InductorChoices
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.utils import fresh_cache
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.functions import FloorDiv

from omniq_compile import OptionError, QuantConfig
from omniq_compile.compiling import inductor
from omniq_compile.lowering.triton_kernels import launch


def compile_once() -> tuple[int, int]:
    """Compile a layer; returns hits and misses of AOTAutograd's cache."""
    torch._dynamo.reset()
    counters.clear()
    layer = torch.nn.Linear(64, 48).to(torch.bfloat16).requires_grad_(False)
    options = {"method": "int8", "min_features": 1}
    torch.compile(layer, backend="omniq", options=options)(torch.randn(5, 64).bfloat16())
    found = counters["aot_autograd"]
    return found["autograd_cache_hit"], found["autograd_cache_miss"]


def test_a_changed_kernel_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_cache(), torch.no_grad():
        assert compile_once() == (0, 1)
        assert compile_once() == (1, 0)
        monkeypatch.setattr(inductor, "_own_code", lambda: "changed")
        assert compile_once() == (0, 1)
        assert compile_once() == (1, 0)
        with torch.compiler.config.patch(cache_key_tag="the user's"):
            assert compile_once() == (0, 1)


def test_another_machine_compiles_nothing_again() -> None:
    """What PyTorch calls a portable cache is of omniq's graphs too."""
    with torch.no_grad():
        with fresh_cache():
            assert compile_once() == (0, 1)
            artifacts = torch.compiler.save_cache_artifacts()
        assert artifacts is not None
        with fresh_cache():
            torch.compiler.load_cache_artifacts(artifacts[0])
            assert compile_once() == (1, 0)
            assert counters["inductor"]["fxgraph_cache_hit"] == 1
            assert counters["inductor"]["fxgraph_cache_miss"] == 0


def test_what_workers_do_not_get_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest block sizes of a kernel are kept under PyTorch's tag, that of the environment.

    Where a compile changed it in this process, each process would time all of them again.
    """
    seen = []

    def record(gm: Any, inputs: Any, options: dict[str, Any]) -> Any:
        seen.append((torch.compiler.config.cache_key_tag, options["aot_inductor.metadata"]))
        return gm.forward

    monkeypatch.setattr(torch._inductor, "compile", record)
    gm, inputs = torch.fx.symbolic_trace(torch.nn.Linear(4, 4)), [torch.randn(2, 4)]
    inductor.compile(gm, inputs, {})
    inductor.compile(gm, inputs, {"aot_inductor.metadata": {"by": "the user"}})
    assert [tag for tag, _ in seen] == [os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")] * 2
    assert [metadata.get("by") for _, metadata in seen] == [None, "the user"]


def test_the_digest_is_of_every_file_that_makes_launches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    before = inductor._own_code.__wrapped__()
    for name in ("launch.py", "tiles.py", "row_scaled_gemm.py"):
        (tmp_path / name).write_text(f"# {name}")
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch.py"))
    digests = [before, inductor._own_code.__wrapped__()]
    for name in ("launch.py", "tiles.py", "row_scaled_gemm.py"):
        (tmp_path / name).write_text(f"# {name}, changed")
        digests.append(inductor._own_code.__wrapped__())
    (tmp_path / "inductor.py").write_text("# other choices")
    monkeypatch.setattr(inductor, "__file__", str(tmp_path / "inductor.py"))
    digests.append(inductor._own_code.__wrapped__())
    assert len(set(digests)) == 6


def test_a_setting_by_name_goes_before_that_of_the_mode() -> None:
    given = {"method": "int8", "mode": "max-autotune", "inductor": {"triton.cudagraphs": False}}
    settings = inductor.settings_of(QuantConfig.from_options(given))
    assert settings["max_autotune"]
    assert not settings["triton.cudagraphs"]


CPP_WRAPPER = """
import torch
for method in ("int8", "fp8", "mxfp8"):
    options = {"method": method, "min_features": 1, "inductor": {"cpp_wrapper": True}}
    torch.compiler.reset()
    model = torch.nn.Linear(70, 38).requires_grad_(False)
    compiled = torch.compile(model, backend="omniq", options=options, dynamic=True)
    for rows in (5, 9):
        x = torch.randn(rows, 70)
        error = (compiled(x) - model(x)).norm() / model(x).norm()
        assert 0 < error < 0.1, (method, error)
"""


def test_every_operator_runs_from_a_wrapper_in_cpp() -> None:
    """In a process of its own: what Inductor generated for a list of one result ended it.

    mxfp4 calls the operators of mxfp8, and mxfp4_dualscale those of fp8.
    """
    done = subprocess.run(
        [sys.executable, "-c", CPP_WRAPPER], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("method", "refused"), [("fp8", True), ("mxfp8", True), ("int8", False)])
def test_nan_is_not_looked_for_in_codes_of_8_bits(method: str, refused: bool) -> None:
    model, x = torch.nn.Linear(70, 38).requires_grad_(False), torch.randn(5, 70)
    options = {"method": method, "min_features": 1, "inductor": {"nan_asserts": True}}
    compiled = torch.compile(model, backend="omniq", options=options)
    if not refused:
        assert compiled(x).isfinite().all()
        return
    with pytest.raises(BackendCompilerFailed) as raised:
        compiled(x)
    assert isinstance(raised.value.inner_exception, OptionError)
    assert "'nan_asserts' fails at codes in torch.float8_e4m3fn" in str(raised.value)


def test_sizes_are_divided_where_the_result_is_whole() -> None:
    s, t = sympy.symbols("s t", integer=True, positive=True)
    many = sum(sympy.symbols("a:9", integer=True, positive=True))
    choice = sympy.Piecewise((s, s > 3), (1, True))
    for numerator, denominator, is_multiple in (
        (960 * s + 6720, s + 7, True),
        (6 * s * t + 42 * t, 2 * s + 14, True),
        (FloorDiv(s, 2) * (s + 7), s + 7, True),
        (6 * s + 6, 4 * s + 4, False),
        (s * (s + 7) / 2, s + 7, False),  # 4 by 8 where s is 1
        (choice, s + 7, False),
        (s + 7, choice, False),
        (sympy.expand(many * (s + 7)), s + 7, False),  # it may take long
    ):
        assert inductor._divides(denominator, numerator) is is_multiple, (numerator, denominator)
    # From torch 2.14 on Inductor divides them itself.
    inductor._divide_sums()
    assert SizeVarAllocator().statically_known_multiple_of(960 * s + 6720, s + 7)
    assert not SizeVarAllocator().statically_known_multiple_of(960 * s + 6720, s + 8)


@pytest.mark.parametrize(("device", "changed"), [("cuda", True), ("xpu", False), ("cpu", False)])
def test_rows_are_held_in_registers_where_that_was_timed(device: str, changed: bool) -> None:
    with FakeTensorMode():
        inputs = [3, torch.empty(2, device=device)]
    with inductor._rows_in_registers(inputs):
        assert (type(V.choices) is not InductorChoices) is changed
    assert type(V.choices) is InductorChoices
