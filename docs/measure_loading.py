"""Measure what loading costs, and write the table of docs/loading.md.

python docs/measure_loading.py            # 2.8 GB of BF16 weights, some five minutes; Linux

Each load is a process of its own, in turn, on files that the system holds in its page cache. A
small load goes before it, so that imports, and building a C++ library, are not part of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from rich.console import Console
from rich.progress import track

from omniq_compile.models.families import FAMILIES

PAGE = Path(__file__).parent / "loading.md"
CLASS = "QwenImageTransformer2DModel"

METHODS = ("int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale")
OPTIONS = {name: {"method": name} for name in METHODS} | {
    "mxfp4_dualscale": {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0}
}

PROCESS = """
import json, sys, time
import torch
import omniq_compile as omniq
from diffusers import QwenImageTransformer2DModel as Model, TorchAoConfig
from omniq_compile.lowering.quantize_weight import quantize_weight

folder, small, load = sys.argv[1:4]

def run(folder):
    if load in ("mapped", "read", "copied"):
        model = Model.from_pretrained(
            folder, torch_dtype=torch.bfloat16, disable_mmap=load == "copied"
        )
        if load == "read":
            for tensor in model.state_dict().values():
                tensor.clone()
        return model
    if load == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        config = TorchAoConfig(Int8WeightOnlyConfig())
        return Model.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=config)
    if load == "diffusers":
        config = omniq.DiffusersConfig("int8")
        return Model.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=config)
    return omniq.load_model(Model, folder, options=json.loads(load))

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

run(small)
quantize_weight(torch.zeros(1, 1 << 22), "int8")
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
start = time.perf_counter()
model = run(folder)
seconds = time.perf_counter() - start
sizes = [(p.nbytes, p.numel() * 2) for p in model.parameters()]
print(json.dumps({
    "seconds": seconds, "peak": status("VmHWM") - before,
    "model": sum(n for n, _ in sizes), "largest": max(b for _, b in sizes),
}))
"""


def write_model(folder: Path, blocks: int, heads: int) -> None:
    """Save random BF16 weights of a Qwen-Image transformer with heads of 128."""
    config = FAMILIES[CLASS].config(heads * 128, 128, blocks)
    with init_empty_weights():
        model = QwenImageTransformer2DModel.from_config(config)
    model.save_config(folder)
    noise = torch.randn(1 << 26, dtype=torch.bfloat16) / 50
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = {name: noise[: s.numel()].view(s).clone() for name, s in shapes.items()}
    safetensors.torch.save_file(weights, folder / "diffusion_pytorch_model.safetensors")


def measure(folder: Path, small: Path, load: str) -> dict[str, float]:
    ran = subprocess.run(
        [sys.executable, "-c", PROCESS, str(folder), str(small), load],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        raise SystemExit(f"the load {load} failed:\n{ran.stderr}")
    result: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--print", action="store_true", help="leave docs/loading.md as it is")
    arguments = parser.parse_args()

    loads = {f"diffusers, BF16, {name}": name for name in ("mapped", "read", "copied")}
    loads |= {f"omniq {name}": json.dumps(options) for name, options in OPTIONS.items()}
    loads["diffusers with omniq int8"] = "diffusers"
    loads["diffusers with torchao int8"] = "torchao"
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in loads}
    with tempfile.TemporaryDirectory() as temporary:
        large, small = Path(temporary, "large"), Path(temporary, "small")
        write_model(large, arguments.blocks, heads=24)
        write_model(small, blocks=1, heads=2)
        order = [name for _ in range(arguments.rounds) for name in loads]
        for name in track(order, "Loading", console=Console(stderr=True)):
            results[name].append(measure(large, small, loads[name]))

    plain = results["diffusers, BF16, read"]
    lines = [
        "| load | peak MB | model MB | peak / (model + largest tensor) | seconds | to read |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rounds in results.items():
        peak = max(r["peak"] for r in rounds)
        model, largest = rounds[0]["model"], rounds[0]["largest"]
        seconds = statistics.median(r["seconds"] for r in rounds)
        ratio = statistics.median(
            r["seconds"] / p["seconds"] for r, p in zip(rounds, plain, strict=True)
        )
        of_model = "" if name.endswith("torchao int8") else f"{model / 1e6:,.0f}"
        lines.append(
            f"| {name} | {peak / 1e6:,.0f} | {of_model} | {peak / (model + largest):.2f} "
            f"| {seconds:.2f} | {ratio:.2f} |"
        )
    gigabytes = plain[0]["model"] / 1e9
    about = (
        f"A Qwen-Image transformer of {arguments.blocks} blocks at true width, {gigabytes:.1f} GB "
        f"in BF16, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {date.today()}. Seconds are medians of {arguments.rounds} "
        "rounds, and so are the ratios; peaks are the largest, beyond what the process held before."
    )
    table = about + "\n\n" + "\n".join(lines) + "\n"
    print(table)
    if not arguments.print:
        text = PAGE.read_text("utf-8")
        marked = r"(?s)(<!-- measured -->\n).*?(<!-- end -->\n)"
        PAGE.write_text(re.sub(marked, lambda m: m[1] + table + m[2], text), "utf-8")


if __name__ == "__main__":
    main()
