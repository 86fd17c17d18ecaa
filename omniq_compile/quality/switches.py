"""Quantizes single layers of a BF16 model for a while, without compiling anything.

A layer that is on computes what it does in the compiled model, by the very functions that its
kernel is made of, called eagerly: with ``compiler: "eager"`` the numbers are the same bit for bit,
and with Inductor they differ by the rounding of fused loops. Each weight is quantized once. So a
candidate costs what calling the model costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from omniq_compile.layer_plan import plan_layers
from omniq_compile.lowering import decoded, decoded_bfloat16, registry, weight_only
from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.formats.format import Parts
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.lowering.schemes import Scheme, w4a8
from omniq_compile.lowering.target import Target, detect
from omniq_compile.model_blocks import module_blocks
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.patterns import first_match

Linear = Callable[[torch.Tensor], torch.Tensor]

# What kernels that emulate a format decode a weight with, by their GEMM.
_DECODERS: dict[Any, Callable[[Parts, str], Parts]] = {
    decoded.gemm: decoded.decode_weight,
    decoded_bfloat16.gemm: decoded_bfloat16.decode_weight,
    weight_only.gemm: weight_only.decode_weight,
}


class Switches:
    """The layers of one model that a config quantizes, each of them off at first."""

    def __init__(self, model: nn.Module, config: QuantConfig) -> None:
        """Prepare a BF16 model; its weights stay as they are.

        Args:
            model: in BF16, on the device it is to run on.
            config: whose layers are prepared.

        Raises:
            OptionError: the config depends on the denoising step.
        """
        if config.w4a8_fallback_steps:
            raise OptionError(
                "w4a8_fallback_steps cannot be tuned with: its activations change from step to "
                "step. Tune without it, and set it beside the layers that are found."
            )
        self._model = model
        self._config = config
        self._target = config.target or detect(next(model.parameters()).device)
        blocks = tuple(f"{name}." for name in module_blocks(model))
        self.names = [r.layer for r in plan_layers(model, config) if r.method is not None]
        self._forms: dict[str, Linear] = {}
        # Layers outside the blocks run as they are, on dequantized weights.
        self._compiled = {n for n in self.names if not blocks or n.startswith(blocks)}

    @contextmanager
    def on(self, names: Collection[str]) -> Iterator[None]:
        """Quantize the named layers inside, and no others."""
        changed = []
        try:
            for name in names:
                layer: Any = self._model.get_submodule(name)
                if name not in self._forms:
                    self._forms[name] = self._form(name, layer)
                layer.forward = self._forms[name]
                changed.append(layer)
            yield
        finally:
            for layer in changed:
                del layer.forward

    def _form(self, name: str, layer: nn.Linear) -> Linear:
        weight = QuantizedTensor.from_weight(
            layer.weight, self._config.scheme.weight, self._config.method
        )
        if name not in self._compiled:
            plain = weight.dequantize()
            return lambda x: F.linear(x, plain, layer.bias)
        fallback = first_match(self._config.w4a8_fallback_layers, name) is not None
        scheme = w4a8(self._config.scheme) if fallback else self._config.scheme
        return _quantized_linear(layer, weight, scheme, self._target)


def _quantized_linear(
    layer: nn.Linear, weight: QuantizedTensor, scheme: Scheme, target: Target
) -> Linear:
    N, K = weight.shape
    chosen: dict[Any, tuple[registry.Kernel, registry.Problem, Parts]] = {}
    wide: dict[Any, Parts] = {}

    def forward(x: torch.Tensor) -> torch.Tensor:
        # What a kernel takes, and how it goes about it, may depend on any of the sizes.
        key = x.shape[:-1], x.dtype
        if key not in chosen:
            problem = registry.Problem(x.shape[:-1].numel(), K, N, x.dim(), 2, x.dtype)
            kernel, refusals = registry.choose(scheme, target, problem)
            if kernel is None:
                raise OptionError(f"no kernel for a weight {[N, K]}: {refusals}")
            parts: Parts = weight.parts
            if kernel.gemm in _DECODERS:
                # In eager code decoding takes far longer than the product; here it happens once.
                if kernel.gemm not in wide:
                    wide[kernel.gemm] = _DECODERS[kernel.gemm](parts, scheme.weight)
                parts = wide[kernel.gemm]
                problem = dataclasses.replace(problem, b_is_weight=False)
            elif kernel.arrange is not registry.as_stored:
                if kernel.arrange not in wide:
                    wide[kernel.arrange] = kernel.arrange(parts)
                parts = wide[kernel.arrange]
            chosen[key] = kernel, problem, parts
        kernel, problem, parts = chosen[key]
        if kernel.takes_matrices:  # which reads rows, see `passes.lower`
            x = x.contiguous()
        return kernel.gemm(
            kernel.quantize(x, scheme.activation), parts, layer.bias, problem, scheme
        )

    return forward
