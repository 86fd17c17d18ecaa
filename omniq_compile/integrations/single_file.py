"""What diffusers' ``from_single_file`` hands over of a single file: checked, and quantized.

diffusers reads the file, gives the tensors the names of its own model, and puts them into it one by
one. What it only warns of or leaves without values, omniq refuses as it does for folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from omniq_compile.checkpoints.filling import QuantizingFill
from omniq_compile.checkpoints.fitting import check_complete, check_shape
from omniq_compile.checkpoints.foreign import refuse_foreign_tensors
from omniq_compile.checkpoints.recorded_options import quantization_config
from omniq_compile.lowering.errors import CheckpointError
from omniq_compile.passes.config import QuantConfig

PLACE = "the file that from_single_file loads"

# As safetensors names them.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def refuse_own(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a file that omniq saved, before its names are taken for another model's.

    Raises:
        CheckpointError: it is one.
    """
    own = next((name for name in tensors if name.endswith(".weight.codes")), None)
    if own is not None:
        raise CheckpointError(
            f"{PLACE} holds {own!r}: omniq quantized and saved it. Load its folder, with the "
            "config.json beside it, by from_pretrained or omniq_compile.load_model."
        )


class SingleFile:
    """A model on the meta device, and the converted tensors of a file that are put into it."""

    def __init__(
        self, model: Any, tensors: Mapping[str, torch.Tensor], config: QuantConfig
    ) -> None:
        """Check the tensors by their names, shapes and dtypes.

        Args:
            model: with parameters of the dtypes to load in.
            tensors: by the names that the model has for them.
            config: how to quantize them.

        Raises:
            CheckpointError: they are quantized already, or do not fit the model; or the model has
                values, which diffusers then replaces without asking its quantizers.
        """
        if not all(parameter.is_meta for parameter in model.parameters()):
            raise CheckpointError(
                "low_cpu_mem_usage cannot be False where weights are quantized. Leave it out."
            )
        refuse_own(tensors)
        about = ((n, _DTYPES.get(t.dtype, str(t.dtype)), t.ndim) for n, t in tensors.items())
        refuse_foreign_tensors(PLACE, about)
        self._expected = check_complete(model, tensors, PLACE)
        for name in tensors.keys() & self._expected.keys():
            check_shape(name, tensors[name], self._expected[name], PLACE)
        self._model = model
        self._config = config
        self._filling: QuantizingFill | None = None

    def put(self, name: str, tensor: torch.Tensor, device: torch.device) -> None:
        """Put one tensor in its place, all of them on the same device.

        Raises:
            WeightError: it holds NaN or Inf; the message names its layer.
        """
        if self._filling is None:  # the first one shows the device, which decides about kernels
            self._filling = QuantizingFill(self._model, self._config, {"": device})
        self._filling.put(name, tensor, self._expected[name])

    def finish(self) -> dict[str, Any] | None:
        """Return what config.json is to say of the model; None where no layer was quantized."""
        quantized = self._filling is not None and self._filling.report(PLACE)
        return quantization_config(self._config) if quantized else None
