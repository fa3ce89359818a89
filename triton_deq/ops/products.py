"""How a matrix product whose tiles a kernel finishes in its own way is cut into programs."""

import math
from typing import Any

import torch

from .launch import next_power_of_2, precision


def tiles(
    rows: int, columns: int, depth: int, dtype: torch.dtype, *, group: int = 8, whole: bool = False
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the constants of a product `[rows, depth] × [depth, columns]`.

    group: how many blocks of rows share what they read of the matrix. whole: a program has whole rows, for a
    norm.

    Without a GPU to time them on these are the tiles that fill tensor cores without spilling; few rows get
    small tiles, so that there are programs enough.
    """
    narrow = dtype in (torch.float16, torch.bfloat16)
    if whole:
        block_b, block_n = 16, max(16, next_power_of_2(columns))
    else:
        block_b = min(max(16, next_power_of_2(rows)), 128 if narrow else 64)
        block_n = min(max(16, next_power_of_2(columns)), 128 if narrow else 64)
        if rows * columns < 132 * block_b * block_n:  # fewer programs than a large GPU has multiprocessors
            block_b, block_n = min(block_b, 32), min(block_n, 64)
    grid = (-(-rows // block_b) * -(-columns // block_n),)
    constants = {
        "BLOCK_B": block_b,
        "BLOCK_N": block_n,
        "BLOCK_K": 16 if whole or dtype == torch.float64 else 64 if narrow else 32,
        "GROUP": group,
        "ALIGN": math.gcd(16 // dtype.itemsize, columns, depth),
        "num_warps": 8 if block_b * block_n >= 8192 else 4,
    }
    return grid, {**constants, **precision(dtype)}
