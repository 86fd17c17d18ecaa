"""The memory that loading takes at its peak: the quantized model, and one tensor more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import QwenImageTransformer2DModel

from omniq_compile.models.random_models import random_model

PEAK = """
import json, sys
import torch
import omniq_compile as omniq
from diffusers import QwenImageTransformer2DModel

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

# What is imported and set up at the first load is no part of the load.
omniq.load_model(QwenImageTransformer2DModel, sys.argv[2], options={"method": sys.argv[3]})
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
model = omniq.load_model(QwenImageTransformer2DModel, sys.argv[1], options={"method": sys.argv[3]})
peak = status("VmHWM") - before
sizes = [(p.nbytes, p.numel() * 2) for p in model.parameters()]
print(json.dumps([peak, sum(n for n, _ in sizes), max(b for _, b in sizes)]))
"""


def write_large(folder: Path) -> int:
    """Write 0.9 GB of random BF16 weights in three files; returns the bytes."""
    from accelerate import init_empty_weights

    about = random_model("QwenImageTransformer2DModel", "tiny").config
    with init_empty_weights():
        model = QwenImageTransformer2DModel.from_config(
            dict(about) | {"num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 3,
                           "axes_dims_rope": (16, 56, 56)}
        )  # fmt: skip
    model.save_config(folder)
    noise = torch.randn(1 << 26, dtype=torch.bfloat16) / 50
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    places = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(shapes)}
    for part in sorted(set(places.values())):
        held = {
            name: noise[: shape.numel()].view(shape).clone()
            for name, shape in shapes.items()
            if places[name] == part
        }
        safetensors.torch.save_file(held, folder / part)
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return 2 * sum(shape.numel() for shape in shapes.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("method", ["int8", pytest.param("mxfp8", marks=pytest.mark.zoo)])
def test_peak_memory_is_the_quantized_model_and_one_tensor(tmp_path: Path, method: str) -> None:
    small = tmp_path / "small"
    random_model("QwenImageTransformer2DModel", "tiny").save_pretrained(small)
    assert write_large(tmp_path) > 9e8
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(small), method],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    peak, quantized, largest = json.loads(ran.stdout.splitlines()[-1])
    print(f"{method}: peak {peak / 1e6:.0f} MB, quantized model {quantized / 1e6:.0f} MB")
    assert quantized > 4e8
    assert peak <= 1.10 * quantized + largest
