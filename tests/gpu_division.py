"""Division as GPUs do it, for tests of what follows from it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class GpuDivision(TorchDispatchMode):
    """Divides float32 as a kernel that Inductor compiles for a GPU may.

    It multiplies by the reciprocal of a number. Between tensors its ``div.full.f32`` has an error
    of up to 2 units in the last place (PTX ISA, "div"): here it is off by ``units`` everywhere, or
    by -2 to 2 where that is None.
    """

    def __init__(self, units: int | None) -> None:
        super().__init__()
        self.units = units
        self.generator = torch.Generator().manual_seed(3)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not torch.ops.aten.div.Tensor:
            return function(*args, **kwargs or {})
        if not isinstance(args[1], torch.Tensor):
            return args[0] * (1 / args[1])
        exact = function(*args)
        if self.units is None:
            off = torch.randint(-2, 3, exact.shape, generator=self.generator, dtype=torch.int32)
        else:
            off = torch.full(exact.shape, self.units, dtype=torch.int32)
        return torch.where(exact == 0, exact, (exact.view(torch.int32) + off).view(torch.float32))
