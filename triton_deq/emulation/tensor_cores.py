"""Which lane of a warp holds which entry of the matrices of tensor cores, where they lie, and their product.

PTX ISA, "Matrix Fragments" and "Shared Memory Matrix Layout". A is m × k by rows, B is k × n by columns, C
and D are m × n. Four lanes share a row, and eight such groups lie below each other: `GROUP` is a lane's row
and `MEMBER` its place in it. Products and sums are exact here, then rounded once; a GPU rounds on the way.
"""

import numpy as np

from .arithmetic import Array, halves, joined, unpacked

LANES = np.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4

SIZES = {"f16": 2, "bf16": 2, "tf32": 4, "f64": 8}
"""Bytes of an entry of A and B, by its kind."""


def multiply(kind: str, m: int, k: int, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """D = A B + C of `mma.sync`, as registers' bits. a, b, c: lists of registers. kind: one of `SIZES`."""
    each = _each(kind)
    right = np.zeros((k, 8))
    for number, register in enumerate(b):
        for place, entries in enumerate(_entries(register, kind)):
            right[each * MEMBER + 4 * each * number + place, GROUP] = entries
    return accumulated(left_of(kind, m, k, a), right, c)


def left_of(kind: str, m: int, k: int, registers: list[Array]) -> Array:
    """A, as a warp's registers hold it."""
    each = _each(kind)
    left = np.zeros((m, k))
    for number, register in enumerate(registers):
        row, column = GROUP + 8 * (number % (m // 8)), each * MEMBER + 4 * each * (number // (m // 8))
        for place, entries in enumerate(_entries(register, kind)):
            left[row, column + place] = entries
    return left


def accumulated(left: Array, right: Array, c: list[Array]) -> list[Array]:
    """D = A B + C, where registers hold C as they will hold D, eight columns after another."""
    m, n = len(left), right.shape[1]
    dtype = np.dtype(f"f{c[0].dtype.itemsize}")
    places = []
    for number in range(len(c)):
        block, within = divmod(number, m // 4)
        places.append((GROUP + 8 * (within // 2), 8 * block + 2 * MEMBER + within % 2))
    sums = np.zeros((m, n))
    for place, register in zip(places, c, strict=True):
        sums[place] = register.view(dtype)
    result = (left @ right + sums).astype(dtype)
    return [np.ascontiguousarray(result[place]).view(c[0].dtype) for place in places]


def entries_of(bits: Array, kind: str) -> Array:
    """What the bits of entries mean."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32) if kind == "tf32" else unpacked(bits, kind)


def _each(kind: str) -> int:
    """How many entries a register holds."""
    return 2 if SIZES[kind] == 2 else 1


def _entries(register: Array, kind: str) -> list[Array]:
    """Of each lane's register the first entries, then the second, if it has two."""
    if kind == "f64":
        return [register.view(np.float64)]
    if kind == "tf32":
        return [entries_of(register, kind)]
    return list(np.moveaxis(entries_of(halves(register), kind), -1, 0))


def dealt(rows: Array) -> Array:
    """Eight rows of four words, a matrix of `ldmatrix`, as a register of a warp."""
    return rows[GROUP, MEMBER]


def gathered(register: Array) -> Array:
    """The other way."""
    rows = np.empty((8, 4), np.uint32)
    rows[GROUP, MEMBER] = register
    return rows


def turned(rows: Array) -> Array:
    """The transpose of eight rows of eight numbers of 16 bits, two in a word."""
    numbers = halves(rows).reshape(8, 8).T
    return joined(numbers[:, ::2], numbers[:, 1::2])


def described_addresses(descriptor: int, rows: Array, k: int, size: int, along_k: bool) -> Array:
    """Where the entries `[rows, k]` of A, or of B's transpose, are by `wgmma`'s matrix descriptor.

    The matrix consists of atoms, eight times as many bytes as the swizzle spans. Along the direction in which
    entries are neighbours, which `along_k` says, the leading offset leads to the next atom; along the other
    one, in which eight of them lie, the stride offset. In each atom 16 bytes change places.

    Raises:
        NotImplementedError: a descriptor with a base offset, or one along rows without a swizzle.
    """
    swizzle, base = descriptor >> 62, descriptor >> 49 & 7
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    span = 16 if swizzle == 0 else 256 >> swizzle
    if base or (swizzle == 0 and not along_k):
        raise NotImplementedError(f"the emulation does not know the matrix descriptor {descriptor:#x}")
    neighbours, others = rows[:, None], np.arange(k)[None, :]
    if along_k:
        neighbours, others = others, neighbours
    byte = neighbours * size
    at = start + byte % span + byte // span * leading + others % 8 * span + others // 8 * stride
    return at ^ ((at >> 7 & span // 16 - 1) << 4)
