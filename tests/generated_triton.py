"""Reads the Triton kernels of a program that Inductor generated, and compiles them for any GPU."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_KERNEL = re.compile(
    r"^(\w+) = async_compile\.triton\('\w+', '''\n?(.*?)''', device_str='cuda'\)", re.M | re.S
)
# What decides about a kernel, in arguments of the decorator, and is left out of its source here.
_DECORATOR = re.compile(r"^@triton_heuristics\.(\w+)\((.*?)\n\)\n(?=@triton\.jit)", re.M | re.S)
_HEADER = re.compile(r"^(from torch\._inductor\.runtime.*|triton_helpers\.set_driver.*)\n", re.M)


@dataclass(frozen=True)
class Kernel:
    """One kernel: its source, apart from the decorator, and what the decorator was given."""

    name: str
    kind: str
    source: str
    meta: dict[str, Any]

    @property
    def signature(self) -> dict[str, str]:
        """Types by parameter, such as ``*bf16``, ``i32`` and ``constexpr``."""
        return dict(self.meta["triton_meta"]["signature"])

    @property
    def constants(self) -> dict[str, Any]:
        """What Inductor fixed."""
        return dict(self.meta["triton_meta"]["constants"])

    @property
    def configs(self) -> list[dict[str, Any]]:
        """What a tile of omniq's fixes, with its warps and stages: one, or a choice."""
        return [dict(config) for config in self.meta["configs"]]

    @property
    def is_own(self) -> bool:
        """Whether it is omniq's and not generated."""
        return self.kind == "user_autotune"

    def load(self, header: str) -> Any:
        """Import the kernel, below lines that import what Inductor's would."""
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(f"{header}\n{self.source}")
        spec = importlib.util.spec_from_file_location(self.name, file.name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @property
    def function(self) -> str:
        """The name of the function that is launched."""
        return re.findall(r"^@triton\.jit\ndef (\w+)\(", self.source, re.M)[0]


def kernels(program: str) -> list[Kernel]:
    """Return a program's kernels, in order."""
    return [parse(name, text) for name, text in _KERNEL.findall(program)]


def parse(name: str, text: str) -> Kernel:
    """Take a kernel's text apart."""
    decorator = _DECORATOR.search(text)
    assert decorator is not None, text
    source = _HEADER.sub("", _DECORATOR.sub("", text))
    return Kernel(name, decorator[1], source, _arguments(decorator[2]))


def _arguments(text: str) -> dict[str, Any]:
    from torch._inductor.runtime import hints

    names = {"__file__": "", "dict": dict} | {name: getattr(hints, name) for name in dir(hints)}
    arguments: dict[str, Any] = eval(f"dict({text}\n)", names)
    return arguments


def blocks(kernel: Kernel, size: Callable[[str], int]) -> dict[str, int]:
    """Return the block sizes that Inductor's autotuning would try, by parameter."""
    free = [n for n, kind in kernel.signature.items() if kind == "constexpr"]
    return {name: size(name) for name in free if name not in kernel.constants}


HEADER = """
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""


def compile_kernel(kernel: Kernel, arch: str) -> str:
    """Compile a kernel for an NVIDIA architecture, such as ``sm_90``; returns its PTX.

    Of a choice it is the last: the first is what others compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(kernel.load(HEADER), kernel.function)
    options = {"num_warps": 4, "num_stages": 1}
    if kernel.is_own:
        constants = kernel.constants | kernel.configs[-1]
        options = {name: constants.pop(name) for name in options}
    else:
        sizes = blocks(kernel, lambda name: 128 if name == "R0_BLOCK" else 8)
        constants = kernel.constants | sizes
    signature = {name: kernel.signature.get(name, "constexpr") for name in function.arg_names}
    by_position = {(function.arg_names.index(n),): value for n, value in constants.items()}
    (attributes,) = kernel.meta["triton_meta"]["configs"]
    compiled = triton.compile(
        ASTSource(function, signature, by_position, attributes),
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options=options,
    )
    return str(compiled.asm["ptx"])
