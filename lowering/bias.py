"""What the kernels' epilogue adds: a vector of N elements."""

from __future__ import annotations

from torch import Tensor

from omniq_compile.lowering.errors import OmniqError


def check_bias(operator: str, bias: Tensor | None, N: int) -> None:
    """Check the bias of an operator that reads N elements of it, whatever its size.

    Raises:
        OmniqError: it is not ``[N]``.
    """
    if bias is not None and bias.shape != (N,):
        raise OmniqError(
            f"{operator}: the bias is {list(bias.shape)}, and the result has N = {N} columns. Pass "
            f"a bias [{N}], such as bias.expand({N}), or None and add it to the result."
        )
