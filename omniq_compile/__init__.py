"""omniq: a torch.compile backend that quantizes diffusion transformers online."""

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

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Decision",
    "GradientError",
    "KernelRow",
    "LayerPlan",
    "OmniqError",
    "OptionError",
    "QuantConfig",
    "QuantizedTensor",
    "Report",
    "Site",
    "WeightError",
    "__version__",
    "compile",
    "denoise_step",
    "explain",
    "flatten_state",
    "kernels",
    "quantize",
    "quantize_",
    "unflatten_state",
]
