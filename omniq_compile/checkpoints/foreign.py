"""Recognises checkpoints that somebody else quantized: they have no BF16 weights to quantize."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omniq_compile.checkpoints.safetensors_files import SafetensorsFiles
from omniq_compile.lowering.errors import CheckpointError

OWN = "omniq"

# What a ``quantization_config`` calls itself, and what loads it.
_LOADERS = {
    "bitsandbytes": "diffusers' or transformers' from_pretrained with bitsandbytes installed",
    "gguf": "diffusers' from_single_file with GGUFQuantizationConfig",
    "torchao": "diffusers' or transformers' from_pretrained with torchao installed",
    "quanto": "diffusers' from_pretrained with optimum-quanto installed",
    "modelopt": "diffusers' from_pretrained with nvidia-modelopt installed",
    "compressed-tensors": "vLLM, or transformers with compressed-tensors installed",
    "fp8": "the engine it was made for, such as vLLM",
    "nunchaku": "nunchaku",
}

# Endings of the tensors that stand beside a quantized weight.
_SCALE_ENDINGS = (
    ".weight_scale", ".weight_scale_inv", ".scale_weight", ".input_scale", ".scale_input",
    ".weight_scale_2", ".absmax", ".quant_map", ".qweight", ".qzeros", ".weight_packed",
    ".wscales", ".SCB",
)  # fmt: skip

# What diffusers and transformers can hold as a full-precision weight, by safetensors' names.
_PLAIN = ("F64", "F32", "F16", "BF16")


def refuse_foreign(folder: Path, config: Mapping[str, Any], files: SafetensorsFiles | None) -> None:
    """Raise if a component's folder holds weights that are quantized already, but not by omniq.

    Raises:
        CheckpointError: it does; the message says by what, and what loads it.
    """
    given = config.get("quantization_config")
    if isinstance(given, Mapping) and given.get("quant_method") != OWN:
        _refuse(folder, _method(given))
    if any(folder.glob("*.gguf")):
        _refuse(folder, "gguf")
    if files is None:
        return
    refuse_foreign_tensors(folder, ((n, t.dtype, len(t.shape)) for n, t in files.tensors.items()))


def refuse_foreign_tensors(place: Path | str, tensors: Iterable[tuple[str, str, int]]) -> None:
    """Raise if tensors are of weights that somebody else quantized.

    Args:
        place: of the tensors, for messages.
        tensors: the name, dtype by safetensors' name and rank of each.

    Raises:
        CheckpointError: they are; the message names the first that shows it.
    """
    for name, dtype, rank in tensors:
        if name.endswith(_SCALE_ENDINGS):
            _refuse(place, "", f"it holds {name!r}")
        if name.endswith("weight") and rank > 1 and dtype not in _PLAIN:
            _refuse(place, "", f"{name!r} is stored as {dtype}")


def _method(given: Mapping[str, Any]) -> str:
    method = given.get("quant_method") or given.get("quant_algo")
    if not method and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        method = "bitsandbytes"
    return str(method or "unknown").lower()


def _refuse(place: Path | str, method: str, evidence: str = "") -> None:
    known = next((loader for name, loader in _LOADERS.items() if method.startswith(name)), None)
    by = f"by {method}" if method else f"already ({evidence})"
    use = f"Load it with {known}, or give" if known else "Give"
    raise CheckpointError(
        f"the weights of {place} are quantized {by}, and omniq quantizes full-precision weights. "
        f"{use} omniq the original BF16 checkpoint."
    )
