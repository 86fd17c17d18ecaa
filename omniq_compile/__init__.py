"""omniq: a torch.compile backend that quantizes diffusion transformers online."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from omniq_compile.components import PipelineQuantConfig, build_quant_config
from omniq_compile.denoise import denoise_step
from omniq_compile.kernels import KernelRow, kernels
from omniq_compile.layer_plan import LayerPlan
from omniq_compile.lowering.errors import (
    CheckpointError,
    GradientError,
    OmniqError,
    OptionError,
    WeightError,
)
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.passes.config import QuantConfig
from omniq_compile.quantize import quantize, quantize_
from omniq_compile.regional import compile
from omniq_compile.report import Decision, Report, Site, explain
from omniq_compile.state import flatten_state, unflatten_state

if TYPE_CHECKING:
    from omniq_compile.loading import load_model
    from omniq_compile.pipeline import from_pretrained
    from omniq_compile.saving import save_model

__version__ = "0.1.0"

# Importing diffusers takes seconds, and compiling a model needs none of it.
_LAZY = {
    "from_pretrained": "omniq_compile.pipeline",
    "load_model": "omniq_compile.loading",
    "save_model": "omniq_compile.saving",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CheckpointError",
    "Decision",
    "GradientError",
    "KernelRow",
    "LayerPlan",
    "OmniqError",
    "OptionError",
    "PipelineQuantConfig",
    "QuantConfig",
    "QuantizedTensor",
    "Report",
    "Site",
    "WeightError",
    "__version__",
    "build_quant_config",
    "compile",
    "denoise_step",
    "explain",
    "flatten_state",
    "from_pretrained",
    "kernels",
    "load_model",
    "quantize",
    "quantize_",
    "save_model",
    "unflatten_state",
]
