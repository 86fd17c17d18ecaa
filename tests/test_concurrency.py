"""Several threads, and several methods, in one process."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Event
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_flux import OPTIONS, inputs, tiny_flux
from torch import nn

import omniq_compile as omniq
from omniq_compile.compiling import weights
from omniq_compile.compiling.weights import resident_bytes


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="omniq", options=OPTIONS | options)


def test_two_threads_of_one_compiled_model_get_their_own_answers() -> None:
    """Cold: both find the model not compiled and its weights not quantized."""
    calls = [inputs(seed=seed) for seed in range(4)]
    with torch.no_grad():
        alone = [compiled(tiny_flux(num_layers=1))(**call)[0] for call in calls]
    torch._dynamo.reset()
    fast, barrier = compiled(tiny_flux(num_layers=1)), Barrier(2)

    def work(mine: list[Any]) -> list[torch.Tensor]:
        barrier.wait()
        with torch.no_grad():
            return [fast(**call)[0] for call in mine for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, [calls[:2], calls[2:]]))
    expected = [[a for a in half for _ in range(3)] for half in (alone[:2], alone[2:])]
    for got, want in zip(results, expected, strict=True):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_two_threads_that_find_a_weight_changed_quantize_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the second began before the first is done, both would hold a form of it."""
    layer = nn.Linear(96, 64, bias=False).requires_grad_(False)
    fast, x = compiled(layer), torch.randn(5, 96)
    fast(x)
    layer.weight.mul_(-2)
    quantize, both = weights.quantize_weight, Barrier(2)

    def slow(*arguments: Any) -> Any:
        with suppress(BrokenBarrierError):
            both.wait(timeout=1)  # for the other thread, if it comes here
        return quantize(*arguments)

    monkeypatch.setattr(weights, "quantize_weight", slow)
    before = weights.statistics()["quantized"]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(fast, [x, x]))
    assert weights.statistics()["quantized"] - before == 1
    expected = layer(x)
    for result in results:
        assert (result - expected).norm() < 0.02 * expected.norm()


def test_two_methods_of_one_model_do_not_mix() -> None:
    """Both quantize the very same parameters; each gives, and holds, what it does alone."""
    given, alone, held = inputs(), {}, {}

    def start() -> int:
        # Earlier models are freed by the collector, whenever it runs: not while one is measured.
        torch._dynamo.reset()
        gc.collect()
        return resident_bytes()

    with torch.no_grad():
        for method in ("int8", "mxfp8"):
            before, model = start(), tiny_flux(num_layers=1)
            alone[method] = compiled(model, method=method)(**given)[0]
            held[method] = resident_bytes() - before
            del model
        assert not torch.equal(alone["int8"], alone["mxfp8"])
        before, model = start(), tiny_flux(num_layers=1)
        fast = {method: compiled(model, method=method) for method in alone}
        for _ in range(2):
            for method, call in fast.items():
                assert torch.equal(call(**given)[0], alone[method])
        assert 0 not in held.values()
        assert resident_bytes() - before == sum(held.values())


def test_loads_that_overlap_leave_other_modules_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second load builds its model while the first begins, and ends after it."""
    tiny_flux(num_layers=1).save_pretrained(tmp_path)
    make, both, one_is_done = FluxTransformer2DModel.from_config, Barrier(2), Event()

    def overlapping(config: Any) -> Any:
        turn, model = both.wait(), make(config)
        if turn == 1:
            one_is_done.wait()
        return model

    def load(_: int) -> nn.Module:
        try:
            return omniq.load_model(tmp_path, options=OPTIONS)
        finally:
            one_is_done.set()

    monkeypatch.setattr(FluxTransformer2DModel, "from_config", overlapping)
    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(load, range(2)))
    assert not any(p.is_meta for model in loaded for p in model.parameters())
    assert not nn.Linear(2, 2).weight.is_meta
