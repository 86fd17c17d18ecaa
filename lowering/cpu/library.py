"""C++ of this folder, built once a machine by the compiler that Inductor uses, and loaded."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("omniq")
_lock = threading.Lock()
_started: set[str] = set()
_loaded: dict[str, ctypes.CDLL | None] = {}


def start(name: str) -> None:
    """Begin to build ``NAME.cpp`` on a thread, for `load` to wait less; what fails, it will say."""
    with _lock:
        if name not in _started and name not in _loaded:
            _started.add(name)
            with contextlib.suppress(Exception):
                _begin(read(f"{name}.cpp"), _builders().submit)


def load(name: str) -> ctypes.CDLL | None:
    """Build and load ``NAME.cpp``, or return None where that fails, and say so once.

    The result is kept in Inductor's cache folder for later processes.
    """
    with _lock:
        if name not in _loaded:
            _loaded[name] = _load(name)
        return _loaded[name]


def _load(name: str) -> ctypes.CDLL | None:
    source = read(f"{name}.cpp")
    try:
        return build(source)
    except Exception as error:  # whatever the compiler, the linker or the file system says
        lines = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning(
            "%s.cpp could not be built, and torch's operators do its work, slower: %s. "
            "Inductor needs the same C++ compiler; see torch._inductor.config.cpp.cxx.",
            name,
            lines[0],
        )
        return None


def read(file: str) -> str:
    """Return a source of this folder as one text, which is what Inductor's cache takes."""
    text = Path(__file__).with_name(file).read_text("utf-8")
    return re.sub(r'^#include "(.*)"$', lambda included: read(included[1]), text, flags=re.M)


def build(source: str) -> ctypes.CDLL:
    """Build and load C++, or take it from Inductor's cache folder; the compiler's errors pass."""
    library = _begin(source)()
    assert isinstance(library, ctypes.CDLL)
    return library


def _begin(source: str, submit: Callable[..., Any] | None = None) -> Callable[[], Any]:
    """Return what waits for the build of C++ and loads it; ``submit`` runs the compiler."""
    # Private, checked on torch 2.11 to 2.15: it knows the flags, the headers and the cache folder.
    from torch._inductor.codecache import CppCodeCache

    loading: Callable[[], Any] = CppCodeCache.load_async(source, submit_fn=submit)
    return loading


@cache
def _builders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="omniq-build")


def call(function: Any, arguments: ctypes.Structure) -> None:
    """Call a function of ``(arguments, message, size)`` that returns 0 or fails with a message.

    Raises:
        RuntimeError: it failed.
    """
    message = ctypes.create_string_buffer(512)
    if function(ctypes.byref(arguments), message, ctypes.c_int64(len(message))):
        raise RuntimeError(message.value.decode(errors="replace"))


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Return where a tensor's data lies, for a ``void*``."""
    return None if tensor is None else tensor.data_ptr()
