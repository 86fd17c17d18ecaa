"""The step that is published for a pipeline's calls of its transformer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

from omniq_compile import denoise_step
from omniq_compile.compiling.denoise import current_step


def test_each_call_of_a_pipeline_counts_its_steps_anew() -> None:
    pipeline, seen = SimpleNamespace(num_timesteps=3), []
    with denoise_step(0) as step:
        for _ in range(2):
            for i in range(3):
                seen.append(current_step())
                step(pipeline, i, None, {})
    assert seen == [0, 1, 2, 0, 1, 2]


def test_each_thread_publishes_its_own_step() -> None:
    """As where a server draws two pictures at once."""
    both = Barrier(2)

    def seen_in(step: int) -> int:
        with denoise_step(step):
            both.wait()
            seen = current_step()
            both.wait()
        return seen

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(seen_in, [3, 5])) == [3, 5]
