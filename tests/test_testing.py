"""The pytest plugin, in projects of its own: changed graphs fail readably, and it is free."""

from __future__ import annotations

import re

import pytest

pytest_plugins = ["pytester"]

PROJECT = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(48, 320), nn.Linear(320, 288)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

def test_graph(graph_snapshot):
    options = {"method": "int8", "ignored_layers": ["head"]}
    model, x = Model(), torch.randn(7, 48)
    graph_snapshot(model, [x], options=options, target="cuda:sm_90", name="quantized")
    graph_snapshot(model, {"x": x}, options=options, target="npu:ascend950", stage="lowered")

def test_twice(graph_snapshot):
    options, inputs = {"method": "int8"}, [torch.ones(7, 48)]
    graph_snapshot(Model(), inputs, options=options, target="xpu", name="x")
    graph_snapshot(Model(), inputs, options=options, target="npu:ascend950", name="x")

def test_changed(graph_snapshot):
    options = {"method": "int8", "ignored_layers": IGNORED}
    graph_snapshot(Model(), [torch.randn(7, 48)], options=options, target="cuda:sm_90")
"""


def project(pytester: pytest.Pytester, *ignored: str) -> None:
    pytester.makepyfile(test_model=PROJECT.replace("IGNORED", repr(list(ignored))))


def test_a_graph_is_stored_once_and_a_changed_one_fails_with_a_diff(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CI", "BUILD_NUMBER"):  # there pytest's summary repeats the message in full
        monkeypatch.delenv(name, raising=False)
    project(pytester, "head")
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    stored = pytester.runpytest_subprocess("--snapshot-update")
    stored.assert_outcomes(passed=2, failed=1)
    # The second would be stored in place of the first, and never be right again.
    assert "two snapshots of one test are called 'x'" in stored.stdout.str()
    files = sorted(pytester.path.glob("__snapshots__/test_model/*.txt"))
    assert len(files) == 4
    text = next(f for f in files if "quantized" in f.name).read_text()
    assert text.startswith("# int8 on cuda:sm_90: 2 products\n")
    assert "#   1 x kept: K = 48 is under min_features = 256\n" in text
    assert "torch.ops.omniq.gemm" in text
    monkeypatch.setenv("PYTHONHASHSEED", "2")
    project(pytester, "down")
    changed = pytester.runpytest_subprocess("--color=no", "-k", "not twice")
    changed.assert_outcomes(passed=1, failed=1)
    out = changed.stdout.str()
    assert "the graph is not the stored one:\n--- stored\n+++ now\n" in out
    assert re.search(r"^-#   1 x int8: cuda_\w+$", out, re.M)
    assert "\n+#   1 x kept: ignored by 'down'\n" in out
    assert "run pytest --snapshot-update and commit the file" in out
    assert len(out.splitlines()) < 60
    assert "Traceback" not in out


def test_a_project_that_does_not_use_it_pays_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_other="""
        import sys

        def test_nothing_is_imported(request):
            assert request.config.pluginmanager.hasplugin("omniq")
            assert [name for name in ("torch", "rich", "diffusers") if name in sys.modules] == []

        def test_syrupy_is_missing(graph_snapshot):
            pass
        """,
        conftest="import sys; sys.modules['syrupy.extensions.single_file'] = None",
    )
    ran = pytester.runpytest_subprocess("-p", "no:syrupy")
    ran.assert_outcomes(passed=1, errors=1)
    message = "*graph_snapshot needs syrupy: pip install 'omniq-compile[[]snapshots[]]'*"
    ran.stdout.fnmatch_lines([message])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": "cuda"}, "target 'cuda' depends on the machine; name one of cuda:sm_120, "),
        ({"target": "cpu"}, "name one of cpu:avx512_bf16"),
        ({"target": "xpu", "stage": "quantised"}, "Did you mean 'quantized'?"),
    ],
)
def test_a_target_that_is_no_target_is_an_error(arguments: dict[str, str], words: str) -> None:
    from torch import nn

    from omniq_compile import OptionError
    from omniq_compile.testing import graph_text

    with pytest.raises(OptionError, match=words.replace("?", r"\?")):
        graph_text(nn.Linear(1, 1), [], {"method": "int8"}, **arguments)


def test_every_public_name_is_found_and_only_when_used() -> None:
    import omniq_compile

    assert set(omniq_compile._HOME) | {"__version__"} == set(omniq_compile.__all__)
    for name in omniq_compile.__all__:
        assert getattr(omniq_compile, name) is not None
    # A submodule of the same name would take a function's place once it is imported.
    assert callable(omniq_compile.quantize)
    assert callable(omniq_compile.kernels)
    with pytest.raises(AttributeError, match="has no attribute 'explian'"):
        _ = omniq_compile.explian
