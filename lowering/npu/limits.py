"""What torch_npu's GEMMs cannot take, told before a graph calls them.

Sources: npu_quant_matmul in _op_plugin_docs.py of torch_npu 2.13.0 (sizes), and the constraints of
the mx modes on Ascend 950 in aclnnQuantMatmulV5 (gitcode.com/cann/ops-nn).
"""

from __future__ import annotations

import torch

from omniq_compile.lowering.formats import get_format, mx
from omniq_compile.lowering.registry import Problem
from omniq_compile.lowering.schemes import Scheme

# The last dimension of x1 and of x2. ``npu_dual_level_quant_matmul`` documents no size, and is held
# to the same.
LARGEST = 65535

DTYPES = (torch.bfloat16, torch.float16)


def refuse(problem: Problem, scheme: Scheme) -> str | None:
    """Return why no GEMM of torch_npu can take a problem, or None."""
    if problem.b_rank > 2:
        return "torch_npu's quantized GEMMs are called with one matrix, not with a batch"
    for name, size in (("K", problem.K), ("N", problem.N)):
        if not isinstance(size, int):
            return f"{name} is symbolic ({size}), and torch_npu takes at most {LARGEST}"
        if name == "K":
            size = get_format(scheme.weight).padded(size)
        if size > LARGEST:
            return f"{name} = {size}, and torch_npu takes at most {LARGEST}"
    if problem.dtype not in DTYPES:
        dtype = str(problem.dtype).removeprefix("torch.")
        return f"the result is {dtype}, and torch_npu's are bfloat16 and float16"
    return None


def refuse_e2m1(problem: Problem, scheme: Scheme) -> str | None:
    """Return why ``npu_quant_matmul`` cannot take a problem with e2m1 operands, or None.

    K in whole blocks has to be an even number of them, and a product with e4m3 is bfloat16.
    """
    refusal = refuse(problem, scheme)
    if refusal is not None:
        return refusal
    blocks = mx.padded(problem.K) // mx.BLOCK
    if blocks % 2:
        return f"K = {problem.K} is {blocks} blocks of 32; torch_npu takes e2m1 in pairs of blocks"
    mixed = problem.b_is_weight and scheme.activation == "mxfp8"
    if mixed and problem.dtype is not torch.bfloat16:
        return "torch_npu multiplies e4m3 with e2m1 to bfloat16, not to float16"
    return None
