"""Which lane of a warp holds which entry of the matrices of `mma.sync`, and their product.

PTX ISA, "Matrix Fragments". A is m × k by rows, B is k × 8 by columns, C and D are m × 8. Four lanes share a
row, and eight such groups lie below each other: `GROUP` is a lane's row and `MEMBER` its place in it.
Products and sums are exact here, then rounded once; a GPU rounds on the way.
"""

import numpy as np

from .arithmetic import Array, halves, unpacked

LANES = np.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4


def multiply(kind: str, m: int, k: int, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """D = A B + C, as registers' bits. kind: f16, bf16, tf32 or f64, of A and B; each a list of registers."""
    left, right = np.zeros((m, k)), np.zeros((k, 8))
    each = 2 if kind in ("f16", "bf16") else 1  # entries of a register
    step = 4 * each  # columns that a group's registers of one row cover
    for number, register in enumerate(a):
        row, column = GROUP + 8 * (number % (m // 8)), each * MEMBER + step * (number // (m // 8))
        for place, entries in enumerate(_entries(register, kind)):
            left[row, column + place] = entries
    for number, register in enumerate(b):
        for place, entries in enumerate(_entries(register, kind)):
            right[each * MEMBER + step * number + place, GROUP] = entries
    dtype = np.float64 if kind == "f64" else np.float32
    sums = np.zeros((m, 8))
    for number, register in enumerate(c):
        sums[GROUP + 8 * (number // 2), 2 * MEMBER + number % 2] = register.view(dtype)
    result = (left @ right + sums).astype(dtype)
    return [
        np.ascontiguousarray(result[GROUP + 8 * (number // 2), 2 * MEMBER + number % 2]).view(register.dtype)
        for number, register in enumerate(c)
    ]


def _entries(register: Array, kind: str) -> list[Array]:
    """Of each lane's register the first entries, then the second, if it has two."""
    if kind == "f64":
        return [register.view(np.float64)]
    if kind == "tf32":
        return [(register & np.uint32(0xFFFFE000)).view(np.float32)]
    return list(np.moveaxis(unpacked(halves(register), kind), -1, 0))


def matrix_addresses(addresses: Array, number: int, transposed: bool) -> list[Array]:
    """Where a lane's two numbers of 16 bits are of `ldmatrix`'s matrix `number`: eight rows of eight.

    addresses: each lane's; those of rows come from lanes 8 · number on.
    """
    rows = addresses[8 * number : 8 * number + 8]
    if transposed:
        return [rows[2 * MEMBER + place] + (2 * GROUP).astype(rows.dtype) for place in (0, 1)]
    return [rows[GROUP] + (4 * MEMBER + 2 * place).astype(rows.dtype) for place in (0, 1)]
