"""How a matrix product whose tiles a kernel finishes in its own way is cut into programs."""

import math
from typing import Any

import torch

from .launch import at_most, next_power_of_2, precision, processors

SIZES = (128, 128), (128, 64), (64, 64), (32, 64)
"""Rows and columns of a program's tile, the largest first."""


def tiles(
    rows: int,
    columns: int,
    depth: int,
    like: torch.Tensor,
    *,
    group: int = 8,
    whole: bool = False,
    most: int = 128,
    paired: bool = False,
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the constants of a product `[rows, depth] × [depth, columns]`.

    like: a tensor of its dtype, on its device. group: how many blocks of rows share what they read of the
    matrix. whole: a program has whole rows, for a norm. most: rows of a tile, in 16 bits, where its epilogue
    needs many registers. paired: where a tile is of the largest size two programs shall fit a multiprocessor,
    so that one's products go on during the other's epilogue; by itself ptxas takes a few registers too many.
    """
    narrow = like.dtype in (torch.float16, torch.bfloat16)
    if whole:
        block_b, block_n = 16, max(16, next_power_of_2(columns))
        # More of rows beyond 1024 bytes would not fit shared memory, or spill.
        block_k = 32 if block_n * like.dtype.itemsize <= 1024 else 16
    else:
        bounds = (most, 128) if narrow else (64, 64)
        block_b, block_n = _tile(rows, columns, *bounds, processors(like.device))
        block_k = 64 if narrow else 16 if like.dtype == torch.float64 else 32
    grid = (-(-rows // block_b) * -(-columns // block_n),)
    constants = {
        "BLOCK_B": block_b,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP": group,
        "ALIGN": math.gcd(16 // like.dtype.itemsize, columns, depth),
        "num_warps": 8 if block_b * block_n >= (4096 if whole else 8192) else 4,
        **(at_most(128) if paired and (block_b, block_n) == SIZES[0] else {}),
    }
    return grid, {**constants, **precision(like.dtype)}


def _tile(rows: int, columns: int, most_rows: int, most_columns: int, processors: int) -> tuple[int, int]:
    """The size of which the busiest multiprocessor reads the fewest rows and columns; the larger of equals.

    Products in 16 bits wait for those rather than for the tensor cores. And of a small product small tiles
    give all multiprocessors something to do.
    """
    most_rows = min(most_rows, max(16, next_power_of_2(rows)))
    most_columns = min(most_columns, max(16, next_power_of_2(columns)))

    def read(size: tuple[int, int]) -> int:
        programs = -(-rows // size[0]) * -(-columns // size[1])
        return -(-programs // processors) * sum(size)

    return min(((min(b, most_rows), min(n, most_columns)) for b, n in SIZES), key=read)
