"""Compiles a suite's programs in several processes, before any of them is timed.

A suite compiles each variant of each case when its turn comes, one after the other. What another
process has compiled lies in Inductor's cache, where those first calls find it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from omniq_compile.benchmark.gemm import compile_gemms
from omniq_compile.benchmark.measure import first_call
from omniq_compile.benchmark.suite_runner import config_of, shapes_of
from omniq_compile.benchmark.suites import Case, Suite
from omniq_compile.benchmark.variants import Variant, named, suite_variants
from omniq_compile.memory import release_unused


def compile_ahead(
    suite: Suite, cases: Iterable[Case], variants: Iterable[Variant], jobs: int
) -> list[str]:
    """Compile every variant of every case in ``jobs`` processes, which share the device.

    Returns what was wrong with those that could not be: the suite will come upon it too.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    names = [variant.name for variant in variants]
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (suite.device, threads))
    try:
        asked = [pool.submit(_compile, suite, case, name) for case in cases for name in names]
        return [error for one in asked if (error := one.result()) is not None]
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(device: str, threads: int) -> None:
    """Leave the other processes their cores, and the terminal to the suite."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch._inductor.config.compile_threads = threads
    if device != "cpu":  # there a program is compiled for a number of threads
        torch.set_num_threads(threads)


def _compile(suite: Suite, case: Case, name: str) -> str | None:
    (variant,) = named(suite_variants(), [name])
    torch.compiler.reset()
    try:
        config = config_of(suite, case)
        first_call(config, variant)
        if variant.options is not None:
            with torch.no_grad():
                compile_gemms(shapes_of(config), variant.options, suite.device)
    except Exception as error:
        return f"{case.name}, {name}: {type(error).__name__}: {error}"
    finally:
        release_unused(torch.device(suite.device))
    return None
