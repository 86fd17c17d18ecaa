"""What Inductor makes of the kernels' arithmetic: loops that are fused, and nothing read twice.

These tests read the generated C++ program. The sizes are ragged and all different, so that a
tensor is known by its number of elements.
"""

from __future__ import annotations

import math
from typing import Any

import format_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import Holder, compiled, dequantized, error
from generated_code import Call, Program, generated

B, T, K, H, N = 2, 13, 70, 150, 45
M = B * T
WIDE = 1030

# The machine's own target, and both kernels of int8, which run on any CPU.
by_target = pytest.mark.parametrize("target", ["cpu", "cpu:avx512_vnni", "cpu:generic"])

GEMMS = ("_int_mm", "int8_matmul", "float32_matmul", "cpu_tile_gemm", "addmm")
QUANTIZES = ("cpu_quantize_activation", "cpu_quantize_activation_scaled")

# One rounding to BF16 errs by up to 2**-9 of a value, and by less over many.
ONE_ROUNDING = 2.0**-9


@torch.library.custom_op("omniq_tests::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@opaque.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def weight(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) / math.sqrt(columns)).to(torch.bfloat16)


def read(model: Holder, *inputs: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Program]:
    return generated(compiled(model, compiler="inductor", **options), *inputs)


def elements(program: Program, call: Call, ctype: str) -> set[int]:
    """Return how many elements those tensors of a type have that a kernel writes."""
    return {program.elements[tensor] for tensor, kind in call.writes.items() if kind == ctype}


def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The int8 linear in float64, by the published formula."""
    return dequantized(x) @ dequantized(w).T + b.double()


def modulated(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def gate(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return F.silu(x[..., :half]) * x[..., half:]


# An activation, the width it takes, and a function that its C++ has to call.
ACTIVATIONS = {
    "gelu": (F.gelu, H, "erf("),
    "tanh-gelu": (lambda x: F.gelu(x, approximate="tanh"), H, "tanh("),
    "silu-gate": (gate, 2 * H, "exp("),
}


@by_target
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_epilogue_activation_and_quantize_are_one_kernel(name: str, target: str) -> None:
    """Between two GEMMs each sum is read by one kernel, which stores int8 and nothing wider.

    A row maximum takes two loops over a row; what the first computes stays in a local buffer of
    one row, or is computed again.
    """
    activation, width, function = ACTIVATIONS[name]
    model = Holder(
        lambda x, u, c, w, b: F.linear(activation(F.linear(x, u, c)), w, b),
        u=weight(width, K), c=random(width), w=weight(N, H), b=random(N),
    )  # fmt: skip
    x = random(B, T, K)
    result, program = read(model, x, target=target)

    _, middle, last = program.kernels
    assert function in middle.source
    assert program.writing("int8_t")[1:] == [middle]
    assert elements(program, middle, "float") == {M}
    assert program.writing("at::BFloat16") == [last]
    assert len(program.operators(*GEMMS)) == 2
    assert program.between() == sorted(
        part
        for columns, rows in ((K, width), (H, N))
        for part in (("float", M), ("int8_t", M * columns), ("int32_t", M * rows))
    )
    for gemm in program.operators(*GEMMS):
        assert [len(program.reading(sums)) for sums in gemm.writes] == [1]

    hidden = activation(linear(x, model.u, model.c)).float()
    assert error(result, linear(hidden, model.w, model.b)) < ONE_ROUNDING


@by_target
@pytest.mark.parametrize("batch", [1, 2])
def test_norm_modulate_and_quantize_are_one_kernel(batch: int, target: str) -> None:
    """Nothing but scales and codes leaves it.

    For one image it is one loop over the rows. For more images, or rows of less than about a
    thousand elements, Inductor cuts it into loops that hand float32 values on through memory.
    """
    model = Holder(
        lambda x, scale, shift, w, b: F.linear(modulated(x, scale, shift), w, b),
        w=weight(N, WIDE), b=random(N),
    )  # fmt: skip
    inputs = [random(batch, rows, WIDE) for rows in (T, 1, 1)]
    result, program = read(model, *inputs, target=target)

    first, last = program.kernels
    rows = batch * T
    assert "sqrt(" in first.source
    assert elements(program, first, "int8_t") == {rows * WIDE}
    assert elements(program, first, "float") == {rows} or batch > 1
    assert program.writing("at::BFloat16") == [last]
    assert program.between() == [("float", rows), ("int32_t", rows * N), ("int8_t", rows * WIDE)]

    exact = modulated(*(x.double() for x in inputs)).float()
    assert error(result, linear(exact, model.w, model.b)) < ONE_ROUNDING


def test_behind_an_opaque_operator_quantize_is_a_kernel_of_its_own() -> None:
    """The near miss: what is counted above when nothing can be fused."""
    model = Holder(lambda x, w: F.linear(opaque(F.gelu(x)), w), w=weight(N, K))
    _, program = read(model, random(B, T, K))
    first, quantize, _ = program.kernels
    assert program.writing("int8_t") == [quantize]
    assert "erf(" in first.source
    assert "erf(" not in quantize.source
    assert program.between().count(("at::BFloat16", M * K)) == 2


@by_target
def test_q_k_and_v_share_one_quantize_loop(target: str) -> None:
    sizes = (N, N - 1, N - 2)
    tensors = {name: weight(rows, K) for name, rows in zip("qkv", sizes, strict=True)}
    model = Holder(lambda x, *weights: [F.linear(x, w) for w in weights], **tensors)
    x = random(B, T, K)
    results, program = read(model, x, target=target)

    (quantize,) = program.writing("int8_t")
    (codes,) = (tensor for tensor, ctype in quantize.writes.items() if ctype == "int8_t")
    gemms = program.operators(*GEMMS)
    assert len(gemms) == 3
    assert program.reading(codes) == gemms
    for result, w in zip(results, tensors.values(), strict=True):
        assert error(result, linear(x, w, torch.zeros(1))) < ONE_ROUNDING


def test_another_input_has_a_quantize_loop_of_its_own() -> None:
    """The near miss of q, k and v: cross attention, where q has another input."""
    model = Holder(
        lambda x, y, q, k, v: (F.linear(x, q), F.linear(y, k), F.linear(y, v)),
        q=weight(N, K), k=weight(N, K), v=weight(N, K),
    )  # fmt: skip
    _, program = read(model, random(B, T, K), random(B, T - 1, K))
    codes = [size for ctype, size in program.between() if ctype == "int8_t"]
    assert codes == [B * (T - 1) * K, B * T * K]


def agreement(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x == y).double().mean().item()


@by_target
def test_scales_bias_and_activation_are_one_pass_and_one_rounding(target: str) -> None:
    """Nearly every element equals the one rounding of a float64 result; rounding twice does not."""
    model = Holder(
        lambda x, w, b, v, c: (F.linear(x, w, b), F.gelu(F.linear(x, v, c))),
        w=weight(N, K), b=random(N), v=weight(N + 1, K), c=random(N + 1),
    )  # fmt: skip
    x = random(B, T, K)
    results, program = read(model, x, target=target)

    for gemm, columns in zip(program.operators(*GEMMS), (N, N + 1), strict=True):
        (sums,) = gemm.writes
        (epilogue,) = program.reading(sums)
        assert elements(program, epilogue, "at::BFloat16") == {M * columns}
        assert len(epilogue.writes) == 1
        assert epilogue.reads[sums] == "int32_t"

    def bfloat16(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16)

    plain, hidden = linear(x, model.w, model.b), linear(x, model.v, model.c)
    product = linear(x, model.w, torch.zeros(1))
    for result, once, twice in (
        (results[0], bfloat16(plain), bfloat16(product) + model.b),
        (results[1], bfloat16(F.gelu(hidden)), F.gelu(bfloat16(hidden))),
    ):
        assert agreement(result, once) > 0.99
        assert agreement(twice, once) < 0.9


@pytest.mark.parametrize("target", ["cpu:generic", "cpu:avx512_bf16"])
@pytest.mark.parametrize("method", ["fp8", "mxfp4", "mxfp4_dualscale"])
def test_nothing_of_a_format_that_is_decoded_is_generated(method: str, target: str) -> None:
    """A C++ file for each loop takes seconds. No decoded weight lies in memory, and nothing is left
    to do after the GEMM."""
    model = Holder(lambda x, w, b: F.linear(F.gelu(x), w, b), w=weight(N, K), b=random(N))
    x = random(B, T, K)
    options: dict[str, Any] = {"method": method, "target": target}
    if method == "mxfp4_dualscale":
        options["num_bf16_fallback_layers"] = 0
    result, program = read(model, x, **options)

    (gemm,), (quantize,) = program.operators(*GEMMS), program.operators(*QUANTIZES)
    (producer,) = program.kernels
    assert "erf(" in producer.source
    assert list(producer.reads.values()) == list(producer.writes.values()) == ["at::BFloat16"]
    assert program.calls[-1] is gemm
    # The values, and per token a scale, if any.
    made = [tensor for tensor in gemm.reads if program.making(tensor)]
    assert all(tensor in quantize.writes for tensor in made)
    assert [program.elements[tensor] for tensor in made] == {
        "fp8": [B * T * K, B * T],
        "mxfp4": [B * T * (K + -K % 32)],
        "mxfp4_dualscale": [B * T * (K + -K % 32), B * T * -(-K // 512)],
    }[method]
    exact = linear(F.gelu(x.double()), model.w, model.b)
    assert error(result, exact) < {"fp8": 0.04}.get(method, 0.18)

    if method == "mxfp4":
        a, b = (
            torch.from_numpy(oracle.mx(t.float().numpy(), oracle.E2M1)[2]).double()
            for t in (F.gelu(x), model.w)
        )
        assert error(result, a @ b.T + model.b.double()) < ONE_ROUNDING
