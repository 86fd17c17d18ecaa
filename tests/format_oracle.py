"""Inputs for the format tests, and the formats written from their definitions in numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from hypothesis import strategies as st

E4M3 = (ml_dtypes.float8_e4m3fn, 8, 448.0)
E2M1 = (ml_dtypes.float4_e2m1fn, 2, 6.0)

KINDS = (
    "normal", "heavy", "outlier_channels", "tiny", "denormal", "near_maximum", "zeros", "mixed",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Draw finite values of a kind; those that the dtype cannot hold are its largest."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if kind == "heavy":
        x = rng.standard_cauchy(shape)
    elif kind == "outlier_channels":
        x *= np.where(rng.random(shape[-1]) < 0.05, 100.0, 1.0)
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "denormal":
        x *= 2.0 ** rng.integers(-150, -115, (*shape[:-1], 1))
    elif kind == "near_maximum":
        x = np.sign(x) * rng.uniform(0.2, 1.0, shape) * float(torch.finfo(dtype).max)
    elif kind == "zeros":
        x *= np.repeat(rng.random((*shape[:-1], shape[-1] // 32 + 1)) < 0.5, 32, -1)[
            ..., : shape[-1]
        ]
    elif kind == "mixed":
        x *= 2.0 ** rng.integers(-100, 100, shape)
    limit = float(torch.finfo(dtype).max)
    return torch.from_numpy(x.clip(-limit, limit)).to(dtype).clamp(-limit, limit)


# Ragged tensors of few rows, float32 and bfloat16, of one and more dimensions.
tensors = st.builds(
    lambda kind, batch, N, K, dtype, seed: make(kind, (*batch, N, K), dtype, seed),
    st.sampled_from(KINDS),
    st.sampled_from([(), (1,), (2, 3)]),
    st.integers(1, 9),
    st.integers(1, 1100),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**32 - 1),
)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def blocks(x: np.ndarray) -> np.ndarray:
    K = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -K % 32)])
    return padded.reshape(*x.shape[:-1], -1, 32)


def mx(
    x: np.ndarray, element: tuple[type, int, float], uos: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """OCP MX v1.0 section 6.3 in float64, cast by ml_dtypes: codes a byte each, scale, values."""
    dtype, emax, largest = element
    block = blocks(x.astype(np.float64))
    amax = np.abs(block).max(-1, keepdims=True)
    shared = np.where(amax > 0, np.frexp(amax)[1] - 1 - emax, -127)
    if uos:
        shared = np.minimum(shared + (amax > 7.25 * np.exp2(shared)), 127 - emax)
    shared = shared.clip(-127, 127)
    codes = (block / np.exp2(shared)).clip(-largest, largest).astype(dtype)
    values = codes.astype(np.float64) * np.exp2(shared)
    scale = np.exp2(shared.squeeze(-1)).astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    shape = (*x.shape[:-1], -1)
    return codes.view(np.uint8).reshape(shape), scale, values.astype(np.float32).reshape(shape)


def pack(codes: np.ndarray) -> np.ndarray:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def decode_e4m3(codes: torch.Tensor) -> np.ndarray:
    """``torch.float8_e4m3fn`` or ``float8_e4m3fnuz`` -> float64 of the same shape."""
    fnuz = codes.dtype is torch.float8_e4m3fnuz
    dtype = ml_dtypes.float8_e4m3fnuz if fnuz else ml_dtypes.float8_e4m3fn
    return codes.view(torch.uint8).numpy().view(dtype).astype(np.float64)


def decode_e2m1(packed: torch.Tensor) -> np.ndarray:
    """Bytes ``[..., n]`` of any 8-bit dtype -> float64 ``[..., 2n]``, the low nibble first."""
    byte = packed.view(torch.uint8).numpy()
    codes = np.stack([byte & 15, byte >> 4], axis=-1).reshape(*byte.shape[:-1], -1)
    return codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def decode_e8m0(scale: torch.Tensor) -> np.ndarray:
    """uint8 or ``torch.float8_e8m0fnu`` -> float64 of the same shape."""
    return np.exp2(scale.view(torch.uint8).numpy().astype(np.float64) - 127)
