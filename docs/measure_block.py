"""Times one variant of the h200 suite on its block, as a CUDA graph, and says in which kernels.

    python docs/measure_block.py "omniq fp8"
    python docs/measure_block.py "omniq fp8" --case "Wan2.2-14B block, 4096 tokens"

`omniq bench --suite h200` takes variants in turn, and is what to compare them by. This is a minute
for one of them, most of it the first call's, and shows where its time goes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

from omniq_compile.benchmark.machine import captured, time_calls, to_device
from omniq_compile.benchmark.suites import SUITES
from omniq_compile.benchmark.variants import named, suite_variants
from omniq_compile.models.random_models import make_inputs, random_model

SUITE = SUITES["h200"]
WARM, ROUNDS, CALLS, SHOWN = 10, 40, 5, 30


def kernels(call: Any) -> list[tuple[str, float, float]]:
    """Return each kernel's name, microseconds and launches in one call, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_time:
            times[event.name].append(event.device_time)
    rows = ((name, sum(each) / CALLS, len(each) / CALLS) for name, each in times.items())
    return sorted(rows, key=lambda row: -row[1])


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=[v.name for v in suite_variants()], metavar="VARIANT")
    parser.add_argument(
        "--case", default=SUITE.cases[1].name, choices=[c.name for c in SUITE.cases]
    )
    asked = parser.parse_args()
    (case,) = (case for case in SUITE.cases if case.name == asked.case)
    (variant,) = named(suite_variants(), [asked.variant])
    device = torch.device("cuda")
    with torch.no_grad():
        model = random_model(case.model, width=case.width, num_blocks=1)
        to_device(model, device)
        inputs = make_inputs(model, image_tokens=case.image_tokens, text_tokens=case.text_tokens)
        inputs = tree_map_only(torch.Tensor, lambda t: t.to(device), inputs)
        start = time.perf_counter()
        function = variant.build(model, inputs)
        function(**inputs)
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        call = captured(lambda: function(**inputs))
        for _ in range(WARM):
            call()
        times = [1e3 * time_calls(call, device, CALLS).seconds for _ in range(ROUNDS)]
        rows = kernels(call)
    median, kernel_time = statistics.median(times), sum(row[1] for row in rows)
    print(f"{variant.name}, {case.name}: {median:.3f} ms, {min(times):.3f} at best", end="; ")
    print(f"first call {first:.1f} s; {kernel_time:.0f} us in kernels")
    for name, microseconds, launches in rows[:SHOWN]:
        print(f"{microseconds:9.1f} us {launches:5.1f} x  {name[:150]}")


if __name__ == "__main__":
    main()
