"""What transformers does to a weight between its file and the model: quantize, or join its parts.

Apart from `transformers_quantizer`, which is imported before these bases of transformers are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from omniq_compile.checkpoints.filling import is_inside
from omniq_compile.checkpoints.fitting import check_shape
from omniq_compile.checkpoints.safetensors_files import release_free_memory
from omniq_compile.checkpoints.state import join_parts, part_owners
from omniq_compile.integrations.text_encoders import kept_in_float32
from omniq_compile.lowering.errors import CheckpointError, WeightError
from omniq_compile.quantize_weights import quantized_parameter

if TYPE_CHECKING:
    from omniq_compile.integrations.transformers_quantizer import OmniqHfQuantizer


class Quantize(ConversionOps):  # type: ignore[misc]
    """Quantizes one weight."""

    def __init__(self, quantizer: OmniqHfQuantizer) -> None:
        """Take the quantizer, which keeps the first error."""
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *_: Any, full_layer_name: str, model: Any, **__: Any
    ) -> dict[str, Any]:
        """Return the weight by its name, quantized; transformers checks no shape of such a one.

        Where that cannot be it is returned as it is: an error here would become a line of
        transformers' own report, so that the quantizer raises it when all is loaded.
        """
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        if self.quantizer.error is None:
            release_free_memory()
            layer = full_layer_name.removesuffix(".weight")
            options = self.quantizer.options
            assert options is not None
            try:
                like = model.get_parameter(full_layer_name)
                check_shape(full_layer_name, weight, like, model.name_or_path)
                weight = quantized_parameter(layer, weight, options)
            except (CheckpointError, WeightError) as error:
                self.quantizer.error = error
        return {full_layer_name: weight}


class Join(ConversionOps):  # type: ignore[misc]
    """Makes one weight of its stored parts."""

    def __init__(self, quantizer: OmniqHfQuantizer) -> None:
        """Take the quantizer; transformers casts nothing for operations that have one."""
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> Join:
        """Return itself: transformers copies it for each weight."""
        return self

    def convert(
        self, input_dict: dict[str, Any], *_: Any, full_layer_name: str, model: Any, **__: Any
    ) -> dict[str, Any]:
        """Return the weight by its name; the parts were checked before."""
        # On the CPU a tensor is the mapped file itself.
        parts = {
            f"{full_layer_name}.{_part(pattern)}": tensor.clone()
            for pattern, (tensor,) in input_dict.items()
        }
        about = self.hf_quantizer.stored[full_layer_name]
        weight = join_parts(full_layer_name, about, parts)
        dtype = model.get_parameter(full_layer_name).dtype
        if is_inside(full_layer_name, kept_in_float32(model, dtype)):
            dtype = torch.float32  # such as T5's wo, whose results float16 does not hold
        weight = weight.with_parts(weight.parts, dtype)
        return {full_layer_name: nn.Parameter(weight, requires_grad=False)}


def joined(quantizer: OmniqHfQuantizer) -> list[WeightConverter]:
    """Return the conversion that joins the parts of every weight."""
    parts = sorted({name.rpartition(".")[2] for name in part_owners(quantizer.stored)})
    if not parts:
        return []
    return [WeightConverter([rf"\.{part}$" for part in parts], "", [Join(quantizer)])]


def _part(pattern: str) -> str:
    return pattern.removeprefix(r"\.").removesuffix("$")
