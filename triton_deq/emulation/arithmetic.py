"""What PTX instructions do with bits, on the 32 lanes of a warp at once.

Registers hold bits, as unsigned numbers; an instruction says what they mean. Kinds are PTX's own names,
`s32`, `f64`, `bf16`. NumPy has all of them but bfloat16 and the pairs of 16 bits. Numbers of 16 bits are
float64 for their arithmetic, where their products are exact.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SIGNED = {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
UNSIGNED = {f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "bu" for bits in (8, 16, 32, 64)}
FLOATS = {f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)}
DTYPES = {"pred": np.dtype(bool), "bf16": np.dtype("u2"), "bf16x2": np.dtype("u4"), "f16x2": np.dtype("u4")}
DTYPES |= SIGNED | UNSIGNED | FLOATS

SUBNORMAL = np.float32(2.0**-126)
"""Smaller ones than this are zero to instructions with .ftz."""


def bits_of(value: Any, dtype: str) -> Array:
    """What a warp's register holds of a result; a single one is that of every lane."""
    if not isinstance(value, np.ndarray) or not value.ndim:
        value = np.full(32, value)
    return value if value.dtype == bool else value.view(dtype)


# ------------------------------------------------------------------------------------------- floating numbers


def from_bf16(bits: Array) -> Array:
    """bfloat16 as float32."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: Array) -> Array:
    """float32 or float64, to the nearest, ties to even."""
    wide = np.asarray(value)
    single = wide.astype(np.float32)
    bits = single.view(np.uint32)
    if wide.dtype == np.float64:  # rounded once: what float32 has lost becomes its last bit
        lost = np.isfinite(wide) & (single != wide)
        bits = np.where(lost & (np.abs(single) > np.abs(wide)), bits - np.uint32(1), bits)
        bits = np.where(lost, bits | np.uint32(1), bits)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(single), 0x7FFF, rounded).astype(np.uint16)


def to_f16(value: Array) -> Array:
    """float32 or float64 as float16's bits."""
    return np.asarray(value).astype(np.float16).view(np.uint16)


def to_tf32(value: Array) -> Array:
    """float32, to the nearest of ten bits, ties away from zero; its bits."""
    bits = (value.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(value), np.uint32(0x7FFFFFFF), bits)


def flushed(value: Array) -> Array:
    """float32 without subnormal numbers."""
    return np.where(np.abs(value) < SUBNORMAL, np.copysign(np.float32(0), value), value)


def fma(a: Array, b: Array, c: Array) -> Array:
    """`a b + c`, rounded once; of float64 nearly so."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (np.asarray(a).astype(wide) * b + c).astype(a.dtype)


def upper_word(value: Array) -> Array:
    """float64 of which only the upper half is given, as by `rcp.approx.ftz.f64`."""
    return (np.asarray(value).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def to_integer(value: Array, dtype: str) -> Array:
    """A whole floating number, held to the range; NaN is 0."""
    limits = np.iinfo(dtype)
    value = np.where(np.isnan(value), 0, value)
    inside = (value >= float(limits.min)) & (value < float(limits.max))
    whole = np.where(inside, value, 0).astype(dtype)
    return np.where(inside, whole, np.where(value < 0, limits.min, limits.max)).astype(dtype)


def halves(pair: Array) -> Array:
    """Two numbers of 16 bits in one of 32: `[..., 2]`, the lower first."""
    return np.ascontiguousarray(
        np.stack([pair & np.uint32(0xFFFF), pair >> np.uint32(16)], -1).astype(np.uint16)
    )


def joined(lower: Array, upper: Array) -> Array:
    """The other way."""
    return np.asarray(lower).astype(np.uint32) | (np.asarray(upper).astype(np.uint32) << np.uint32(16))


def unpacked(bits: Array, kind: str) -> Array:
    """Numbers of kind f16, bf16, f16x2 or bf16x2 as float64."""
    bits = halves(bits) if kind.endswith("x2") else np.asarray(bits)
    return (from_bf16(bits) if kind.startswith("bf16") else bits.view(np.float16)).astype(np.float64)


def packed(value: Array, kind: str) -> Array:
    """The other way, rounded."""
    bits = to_bf16(value) if kind.startswith("bf16") else to_f16(value)
    return joined(bits[..., 0], bits[..., 1]) if kind.endswith("x2") else bits


# ---------------------------------------------------------------------------------------------- whole numbers


def shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, by: Array) -> Array:
    """Signed numbers keep their sign."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def divide(a: Array, b: Array) -> Array:
    """Towards zero; of a division by zero something."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    inexact = (quotient * safe != a) & ((a < 0) != (safe < 0))
    return quotient + inexact.astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    return a - divide(a, b) * b


def upper_product(a: Array, b: Array) -> Array:
    """The upper half of the bits of `a b`."""
    a, b = np.broadcast_arrays(a, b)
    bits = 8 * a.dtype.itemsize
    exact = [int(one) * int(other) >> bits for one, other in zip(a.flat, b.flat, strict=True)]
    return np.array(exact, dtype=a.dtype).reshape(a.shape)


def extract(a: Array, position: int, length: int, signed: bool) -> Array:
    """`length` bits from `position`, extended by their sign or by zeros."""
    bits = 8 * a.dtype.itemsize
    moved = np.asarray(a) << a.dtype.type(bits - position - length)
    moved = moved.view(f"i{bits // 8}") if signed else moved
    return (moved >> moved.dtype.type(bits - length)).view(a.dtype)


def permuted_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Four of the eight bytes of a and b, by four digits of the selector; the digit's top bit: its sign."""
    both = np.asarray(a).astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    result = np.zeros(both.shape, np.uint32)
    for place in range(4):
        digit = (np.asarray(selector) >> np.uint32(4 * place)) & np.uint32(0xF)
        byte = (both >> ((digit & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        byte = np.where(digit & np.uint32(8), sign, byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * place)
    return result
