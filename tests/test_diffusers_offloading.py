"""Models whose weights diffusers or accelerate moves between calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from tiny_flux import OPTIONS, inputs, tiny_flux


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="omniq", options=OPTIONS)


OFFLOADS: dict[str, dict[str, Any]] = {
    "leaf level": {"offload_type": "leaf_level"},
    "block level": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "to disk": {"offload_type": "leaf_level", "offload_to_disk_path": "folder"},
}


@pytest.mark.parametrize("name", OFFLOADS)
@torch.no_grad()
def test_group_offloading_is_followed(name: str, tmp_path: Path) -> None:
    model, given = tiny_flux(), inputs()
    expected = model(**given)[0]
    options = dict(OFFLOADS[name])
    if "offload_to_disk_path" in options:
        options["offload_to_disk_path"] = str(tmp_path)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
    fast = compiled(model)
    for _ in range(2):
        assert 0 < error(fast(**given)[0], expected) < 0.03


def test_a_pipelines_cpu_offload_is_followed_or_refused() -> None:
    """Without an accelerator diffusers refuses it itself; its hooks are run here on the CPU."""
    from accelerate import cpu_offload_with_hook

    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, tiny_flux()
    )
    if not torch.accelerator.is_available():
        with pytest.raises(RuntimeError, match="accelerator"):
            pipe.enable_model_cpu_offload()
    model, given = pipe.transformer, inputs()
    with torch.no_grad():
        expected = model(**given)[0]
        model, hook = cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
        fast = compiled(model)
        for _ in range(2):
            assert 0 < error(fast(**given)[0], expected) < 0.03
            hook.offload()
