"""One process of a model that diffusers spreads over two; prints how far its result is off."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import error
from diffusers import ContextParallelConfig
from diffusers.hooks import tensor_parallel
from diffusers.models._modeling_parallel import TensorParallelConfig
from tiny_flux import OPTIONS, inputs, tiny_flux
from torch import distributed

import omniq_compile

PROCESSES = 2


@torch.no_grad()
def main(kind: str, way: str, meeting: str, rank: int) -> None:
    torch.manual_seed(0)
    # diffusers numbers GPUs, and knows tensor parallelism on them alone.
    torch.accelerator.device_count = lambda: PROCESSES
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES
    )
    model, given = tiny_flux(), inputs(rows=4, columns=6, text=8)
    alone = model(**given)[0]
    config = {
        "tensor": TensorParallelConfig(tp_degree=PROCESSES),
        "context": ContextParallelConfig(ulysses_degree=PROCESSES),
    }[kind]
    model.enable_parallelism(config=config)
    if way == "whole":
        fast = torch.compile(model, backend="omniq", options=OPTIONS | {"compiler": "aot_eager"})
    else:
        fast = omniq_compile.compile(model, OPTIONS | {"compiler": "aot_eager"})
    sites = []
    omniq_compile.backend.summary_line = lambda context, _: sites.extend(context.sites) or ""
    result = fast(**given)[0]
    kept = sum(site.decision.method is None for site in sites)
    print(f"result {error(result, alone)} {len(sites)} {kept}", flush=True)
    distributed.destroy_process_group()


main(*sys.argv[1:4], int(sys.argv[4]))
