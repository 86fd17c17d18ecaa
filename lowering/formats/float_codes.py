"""The element types of the low-precision formats: e4m3, e2m1 and the scale type e8m0.

The types are those of OCP Microscaling Formats (MX) v1.0, sections 5.3.1 (e4m3, as in OCP 8-bit
Floating Point v1.0), 5.3.3 (e2m1) and 5.4.1 (e8m0). Everything is bit arithmetic or float
arithmetic that Inductor vectorizes. No step needs a float32 denormal to survive: the subnormals of
e4m3 and e2m1 decode exactly even when denormals are flushed to zero.

e8m0 is stored as uint8: Inductor's C++ backend has no ``torch.float8_e8m0fnu``.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
E4M3_MIN_NORMAL = 2.0**-6
E2M1_MAX = 6.0
E8M0_NAN = 255


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest e4m3 value, half to even, saturated at +-448; NaN stays NaN.

    Args:
        x: float32, any shape.

    Returns:
        float32 of the same shape, every value exact in e4m3.
    """
    x = x.clamp(-E4M3_MAX, E4M3_MAX)
    binade = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(E4M3_MIN_NORMAL)
    # Beside 1.5 * 2**(e + 20) a float32 has a step of 2**(e - 3), which is that of e4m3 at 2**e, so
    # the addition itself rounds half to even; 1.5 keeps negative sums in the same binade.
    rounder = binade * (1.5 * 2.0**20)
    return torch.copysign((x + rounder) - rounder, x)


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest e2m1 value, half to even, saturated at +-6; NaN stays NaN.

    Args:
        x: float32, any shape.

    Returns:
        float32 of the same shape, every value one of +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}.
    """
    magnitude = x.abs().clamp_max(E2M1_MAX)
    half_steps = torch.round(magnitude * 2) * 0.5
    double_steps = torch.round(magnitude * 0.5) * 2
    above = torch.where(magnitude < 4, torch.round(magnitude), double_steps)
    return torch.copysign(torch.where(magnitude < 2, half_steps, above), x)


def encode_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round as `round_to_e4m3` does; float32 -> ``torch.float8_e4m3fn``, NaN -> a NaN code."""
    # Saturated first: what the cast makes of larger values differs between devices and versions.
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round as `round_to_e2m1` does; float32 -> uint8 codes 0 to 15 (e2m1 has no NaN: 0)."""
    magnitude = x.abs().clamp_max(E2M1_MAX)
    binade = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(1.0)
    # Beside 1.5 * 2**(e + 22) a float32 has a step of 2**(e - 1), which is that of e2m1 at 2**e:
    # the addition rounds half to even, and leaves the number of steps in the lowest bits.
    steps = (magnitude + binade * (1.5 * 2.0**22)).view(torch.int32) & 7
    code = steps + ((binade.view(torch.int32) >> 22) - (127 << 1))
    code = torch.where(x.isnan(), 0, code)
    return (code | ((x.view(torch.int32) >> 28) & 8)).to(torch.uint8)


def _e4m3_to_float(code: torch.Tensor) -> torch.Tensor:
    """Decode int32 codes, 0 to 255 -> float32."""
    magnitude = code & 0x7F
    # Field 121 in place of 0 makes a subnormal the normal 2**-6 more, which is taken again.
    subnormal = ((magnitude << 20) + (121 << 23)).view(torch.float32) - E4M3_MIN_NORMAL
    # Magnitude 0x7F alone carries into bit 7, and gets the exponent field of a NaN.
    nan_field = -((magnitude + 1) >> 7) & 0x7F800000
    normal = (((magnitude << 20) + (120 << 23)) | nan_field).view(torch.float32)
    value = torch.where(magnitude < 8, subnormal, normal)
    return (value.view(torch.int32) | ((code & 0x80) << 24)).view(torch.float32)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Decode ``torch.float8_e4m3fn`` (or its bytes as uint8) -> float32 of the same shape."""
    return _e4m3_to_float(codes.view(torch.uint8).to(torch.int32))


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Decode e2m1 codes, any integer dtype, 0 to 15 -> float32 of the same shape."""
    code = codes.to(torch.int32)
    magnitude = code & 7
    # Field 127 in place of 0 makes a subnormal the normal 1 more, which is taken again.
    subnormal = ((magnitude << 22) + (127 << 23)).view(torch.float32) - 1.0
    normal = ((magnitude << 22) + (126 << 23)).view(torch.float32)
    value = torch.where(magnitude < 2, subnormal, normal)
    return (value.view(torch.int32) | ((code & 8) << 28)).view(torch.float32)


def decode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """Decode e8m0 bytes: uint8 -> float32 ``2**(byte - 127)``, and 255 -> NaN.

    Byte 0 is the float32 denormal 2**-127, which arithmetic that flushes denormals takes for 0:
    `scale_by_e8m0` multiplies by it safely.
    """
    byte = scale.to(torch.int32)
    # 2**-127 and NaN have the same mantissa, the top bit.
    special = ((byte == 0) | (byte == E8M0_NAN)).to(torch.int32)
    return ((byte << 23) | (special << 22)).view(torch.float32)


def scale_by_e8m0(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply by ``2**(scale - 127)`` without a denormal factor.

    Args:
        values: float32, 0 or at least 2**-9 in magnitude.
        scale: uint8 or int32 e8m0 bytes that broadcast with ``values``; 255 makes NaN.
    """
    byte = scale.to(torch.int32)
    large = byte.clamp_min(2)
    small = ((byte - large + 127) << 23).view(torch.float32)
    power = ((large << 23) | ((byte == E8M0_NAN).to(torch.int32) << 22)).view(torch.float32)
    return values * small * power


def pack_e2m1(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """Put two codes in a byte, those of even k in the low nibble: uint8, any shape.

    The order is that of `torch.float4_e2m1fn_x2`.
    """
    return even | (odd << 4)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_e2m1`: uint8 ``[..., n]`` -> uint8 codes ``[..., 2n]``."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def e2m1_pairs(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a packed row as two: uint8 ``[..., n]`` -> float32 ``[..., n]`` of even and odd k."""
    byte = packed.to(torch.int32)
    return decode_e2m1(byte), decode_e2m1(byte >> 4)


def e4m3_pairs(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a row as two: e4m3 ``[..., 2n]`` -> float32 ``[..., n]`` of even and odd k.

    A NaN code comes out as +-480: quantizing makes one only where the scale is NaN or Inf too, and
    looking for them would double the time.
    """
    word = codes.view(torch.int16).to(torch.int32)
    return _e4m3_through_half(word & 0xFF), _e4m3_through_half((word >> 8) & 0xFF)


def _e4m3_through_half(code: torch.Tensor) -> torch.Tensor:
    """Decode int32 codes as float16, which has e4m3's fields with a bias larger by 8."""
    half = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
    return half.to(torch.int16).view(torch.float16).to(torch.float32) * 2.0**8


def join_bfloat16(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """Interleave two float32 ``[..., n]`` that bfloat16 holds exactly: bfloat16 ``[..., 2n]``.

    One 32-bit word for two results vectorizes three times as fast as `torch.stack` does.
    """
    low = (even.view(torch.int32) >> 16) & 0xFFFF
    return (low | (odd.view(torch.int32) & -0x10000)).view(torch.bfloat16)
