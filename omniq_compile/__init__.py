"""omniq: a torch.compile backend that quantizes diffusion transformers online."""

from omniq_compile.denoise import denoise_step
from omniq_compile.kernels import KernelRow, kernels
from omniq_compile.lowering.errors import GradientError, OmniqError, OptionError, WeightError
from omniq_compile.passes.config import QuantConfig
from omniq_compile.regional import compile
from omniq_compile.report import Decision, Report, Site, explain

__version__ = "0.1.0"

__all__ = [
    "Decision",
    "GradientError",
    "KernelRow",
    "OmniqError",
    "OptionError",
    "QuantConfig",
    "Report",
    "Site",
    "WeightError",
    "__version__",
    "compile",
    "denoise_step",
    "explain",
    "kernels",
]
