"""omniq: a torch.compile backend that quantizes diffusion transformers online."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from omniq_compile.checkout import find_beside
from omniq_compile.registration import register_when_imported

if TYPE_CHECKING:
    from omniq_compile.checkpoints.loading import load_model
    from omniq_compile.checkpoints.saving import save_model
    from omniq_compile.checkpoints.state import flatten_state, unflatten_state
    from omniq_compile.compiling.denoise import denoise_step
    from omniq_compile.compiling.regional import compile
    from omniq_compile.integrations.diffusers_quantizer import DiffusersConfig
    from omniq_compile.integrations.transformers_quantizer import TransformersConfig
    from omniq_compile.kernel_table import KernelRow, kernels
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
    from omniq_compile.pipelines.components import PipelineQuantConfig, build_quant_config
    from omniq_compile.pipelines.from_pretrained import from_pretrained
    from omniq_compile.quantize_weights import quantize, quantize_
    from omniq_compile.reports.report import Decision, Report, Site, explain

__version__ = "0.1.0"

find_beside()
register_when_imported()

# Nothing is imported before it is used: pytest and torch import parts of this package in every
# process of an environment that has it, and those have to cost nothing.
_MODULES = {
    "checkpoints.loading": ("load_model",),
    "checkpoints.saving": ("save_model",),
    "checkpoints.state": ("flatten_state", "unflatten_state"),
    "compiling.denoise": ("denoise_step",),
    "compiling.regional": ("compile",),
    "integrations.diffusers_quantizer": ("DiffusersConfig",),
    "integrations.transformers_quantizer": ("TransformersConfig",),
    "kernel_table": ("KernelRow", "kernels"),
    "layer_plan": ("LayerPlan",),
    "lowering.errors": (
        "CheckpointError",
        "GradientError",
        "OmniqError",
        "OptionError",
        "WeightError",
    ),
    "lowering.quantized_tensor": ("QuantizedTensor",),
    "passes.config": ("QuantConfig",),
    "pipelines.components": ("PipelineQuantConfig", "build_quant_config"),
    "pipelines.from_pretrained": ("from_pretrained",),
    "quantize_weights": ("quantize", "quantize_"),
    "reports.report": ("Decision", "Report", "Site", "explain"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"omniq_compile.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


__all__ = [
    "CheckpointError",
    "Decision",
    "DiffusersConfig",
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
    "TransformersConfig",
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
