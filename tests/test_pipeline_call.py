"""What a pipeline's call raises, as a command says it."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from diffusers.utils import import_utils
from torch._dynamo.exc import BackendCompilerFailed

from omniq_compile import OptionError
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.pipelines.call import call_worded


@pytest.mark.parametrize("there", [False, True])
def test_a_library_that_a_call_lacks(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipeline:
        def __call__(self, prompt: str) -> str:
            return ftfy.fix_text(prompt)  # noqa: F821

    monkeypatch.setattr(import_utils, "is_ftfy_available", lambda: there)
    with pytest.raises(NameError if there else OmniqError, match="ftfy") as raised:
        call_worded(Pipeline(), {"prompt": "fox"})
    assert there or str(raised.value).endswith("which is not installed: pip install ftfy.")


@pytest.mark.parametrize("wrong", [OptionError("mine"), ValueError("another's")])
def test_what_omniq_refuses_while_a_call_compiles_comes_out_of_dynamos_error(
    wrong: Exception,
) -> None:
    def backend(*_: Any) -> Any:
        raise wrong

    class Pipeline:
        def __call__(self, prompt: str) -> torch.Tensor:
            return torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))

    expected = OptionError if isinstance(wrong, OptionError) else BackendCompilerFailed
    with pytest.raises(expected, match=str(wrong)) as raised:
        call_worded(Pipeline(), {"prompt": "fox"})
    shown = "".join(traceback.format_exception(raised.value))
    assert ("exc.BackendCompilerFailed: " in shown) == (expected is BackendCompilerFailed)


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            r"Draw less .* \(CUDA out of memory. Tried\)",
        ),
        (MemoryError("Unable to allocate"), r"ran out of memory.* \(Unable to"),
        (RuntimeError("CUDA error: an illegal memory access"), None),
    ],
)
def test_memory_that_ends_is_one_line(raised: Exception, words: str | None) -> None:
    class Pipeline:
        def __call__(self, prompt: str) -> None:
            raise raised

    with pytest.raises(OmniqError if words else type(raised), match=words):
        call_worded(Pipeline(), {"prompt": "fox"})


def test_so_is_the_hosts() -> None:
    class Pipeline:
        def __call__(self, height: int) -> torch.Tensor:
            return torch.empty(height, 1 << 40)

    with pytest.raises(
        OmniqError, match=r"Pipeline ran out of memory.*height, width, .*DefaultCPUAllocator"
    ):
        call_worded(Pipeline(), {"height": 1 << 16})
