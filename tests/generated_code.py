"""Reads the C++ program that Inductor generates: its calls, and the tensors between them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.utils import run_and_get_code

_KERNEL = re.compile(
    r"^(\w+) = async_compile\.cpp_pybinding\(\[(.*?)\], r'''(.*?)'''\)", re.M | re.S
)
_BODY = re.compile(r"def call\(self, args\):\n(.*?)\n        return ", re.S)

# The lines of a program's body, after comments are cut off.
_ALIAS = re.compile(
    r"(buf\d+) = (?:reinterpret_tensor\(|torch\.ops\.aten\.view\.dtype\()?(buf\d+)\b.*"
)
_PART = re.compile(r"(buf\d+) = (buf\d+)\[\d+\]")
_VIEW = re.compile(r"(buf\d+) = torch\.ops\.aten\.view\.dtype\((arg\w+),.*")
_ALLOCATE = re.compile(r"(buf\d+) = empty_strided_cpu\(\((.*?)\), .*")
# The second from torch 2.14 on, where those of the inputs stand in one line.
_CHECK = re.compile(r"assert_(?:size_stride|tensor_metadata)\((\w+), \((.*?)\), .*")
_GENERATED = re.compile(r"(cpp_\w+)\((.*)\)")
_OPERATOR = re.compile(r"(?:(buf\d+) = )?((?:extern_kernels|torch\.ops)\.[\w.]+)\((.*)\)")
_NOTHING = re.compile(r"|del .*|args\.clear\(\)|.* = args|assert_(alignment|size_stride_grouped).*")


@dataclass(frozen=True)
class Call:
    """One call of the program: to a generated kernel, or to an operator.

    Attributes:
        target: the name of the kernel or of the operator.
        source: a kernel's C++, "" for an operator.
        reads: the tensors it only reads, each with its C++ type, "" for an operator.
        writes: the tensors it writes, and may read again, likewise.
    """

    target: str
    source: str
    reads: dict[str, str]
    writes: dict[str, str]


@dataclass(frozen=True)
class Program:
    """The calls of a compiled graph in order, the elements of each tensor, and the whole text."""

    calls: list[Call]
    elements: dict[str, int]
    text: str

    @property
    def kernels(self) -> list[Call]:
        """The calls to generated kernels."""
        return [call for call in self.calls if call.source]

    def operators(self, *names: str) -> list[Call]:
        """Return the calls to operators of these names, of any overload."""
        wanted = set(names)
        return [c for c in self.calls if not c.source and wanted & {*c.target.split(".")}]

    def writing(self, ctype: str) -> list[Call]:
        """Return the kernels that write a tensor of a C++ type."""
        return [call for call in self.kernels if ctype in call.writes.values()]

    def making(self, tensor: str) -> list[Call]:
        """Return the calls that write a tensor."""
        return [call for call in self.calls if tensor in call.writes]

    def reading(self, tensor: str) -> list[Call]:
        """Return the calls that read a tensor which they do not write."""
        return [call for call in self.calls if tensor in call.reads]

    def between(self) -> list[tuple[str, int]]:
        """Return (C++ type, elements) of each tensor that one call writes and another one reads.

        Tensors that only one kernel sees are left out: they are that kernel's own scratch.
        """
        ctypes: dict[str, str] = {}
        for call in self.kernels:
            ctypes |= call.reads | call.writes
        written = [tensor for call in self.calls for tensor in call.writes]
        read = {tensor for call in self.calls for tensor in call.reads}
        return sorted((ctypes.get(t, ""), self.elements[t]) for t in set(written) & read)


def generated(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Program]:
    """Call a compiled function for the first time; return its result and its one program.

    `run_and_get_code` and the text it returns are private to PyTorch; checked on torch 2.13. A
    line that is not known here is an error, so that another version cannot go unread.
    """
    # One name is one tensor, if no tensor may move into another's memory.
    with torch._inductor.config.patch(allow_buffer_reuse=False, inplace_buffers=False):
        result, codes = run_and_get_code(function, *inputs)
    assert len(codes) == 1
    return result, _parse(codes[0])


def _parse(text: str) -> Program:
    kernels = {
        name: (re.findall(r"'(.*?)'", types), source)
        for name, types, source in _KERNEL.findall(text)
    }
    aliases: dict[str, str] = {}
    elements: dict[str, int] = {}
    calls: list[Call] = []

    def named(arguments: str) -> list[str]:
        names = re.findall(r"\b(?:buf\d+|arg\w+|_frozen_param\d+)\b", arguments)
        return [aliases.get(name, name) for name in names]

    body = _BODY.search(text)
    assert body is not None
    for line in body[1].splitlines():
        line = line.split("#")[0].strip()
        if found := _PART.fullmatch(line):
            (call,) = (call for call in calls if found[2] in call.writes)
            call.writes[found[1]] = ""
        elif found := _ALIAS.fullmatch(line):
            aliases[found[1]] = aliases.get(found[2], found[2])
        elif found := _ALLOCATE.fullmatch(line) or _CHECK.fullmatch(line):
            sizes = map(int, re.findall(r"\d+", found[2]))
            elements.setdefault(aliases.get(found[1], found[1]), math.prod(sizes))
        elif found := _GENERATED.fullmatch(line):
            types, source = kernels[found[1]]
            arguments = list(zip(named(found[2]), types, strict=True))
            reads = {x: t[6:-1] for x, t in arguments if t.startswith("const ")}
            writes = {x: t[:-1] for x, t in arguments if not t.startswith("const ")}
            calls.append(Call(found[1], source, reads, writes))
        elif found := _OPERATOR.fullmatch(line):
            given, _, out = found[3].partition("out=")
            writes = dict.fromkeys(named(found[1] or out), "")
            calls.append(Call(found[2], "", dict.fromkeys(named(given), ""), writes))
        else:
            assert _NOTHING.fullmatch(line), line
    return Program(calls, elements, text)
