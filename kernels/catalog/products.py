"""What the entries of matrix products share: as the ops cut them, and what does them."""

from math import ceil, gcd
from typing import Any

import triton.language as tl

from .entry import BYTES


def product_unit(dtype: str) -> tuple[str, int]:
    """The unit that multiplies matrices, and how many of its products make one: three of TF32 for float32."""
    return {"fp32": ("tensor_tf32", 3), "fp64": ("fp64", 1)}.get(dtype, (f"tensor_{dtype}", 1))


def precision_of(dtype: str) -> dict[str, Any]:
    names = {"fp32": tl.float32, "fp64": tl.float64, "fp16": tl.float16, "bf16": tl.bfloat16}
    return {"TF32": False, "OPERAND": names[dtype], "WIDE": tl.float64 if dtype == "fp64" else tl.float32}


def tiles_of(
    dtype: str,
    rows: int,
    columns: int,
    depth: int,
    *,
    group: int = 8,
    whole: bool = False,
    most: int = 128,
    paired: bool = False,
) -> tuple[dict[str, int], dict[str, int]]:
    """As triton_deq/ops/products.py cuts a product for 132 multiprocessors: the constants, the options."""
    narrow = dtype in ("fp16", "bf16")
    most_rows, most_columns = (most, 128) if narrow else (64, 64)

    def read(size: tuple[int, int]) -> int:
        return ceil(ceil(rows / size[0]) * ceil(columns / size[1]) / 132) * sum(size)

    fitting = [
        (min(b, most_rows, power(rows)), min(n, most_columns, power(columns)))
        for b, n in ((128, 128), (128, 64), (64, 64), (32, 64))
    ]
    block_b, block_n = (16, power(columns)) if whole else min(fitting, key=read)
    block_k = 64 if narrow else 16 if dtype == "fp64" else 32
    if whole:
        block_k = 32 if block_n * BYTES[dtype] <= 1024 else 16
    constants = {
        "BLOCK_B": block_b,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP": group,
        "ALIGN": gcd(16 // BYTES[dtype], columns, depth),
    }
    options = {
        "num_warps": 8 if block_b * block_n >= (4096 if whole else 8192) else 4,
        "enable_fp_fusion": True,
    }
    return constants, options | ({"maxnreg": 128} if paired and (block_b, block_n) == (128, 128) else {})


def power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
