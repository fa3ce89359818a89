"""The multiscale sum's kernels in the catalog."""

from typing import Any

import triton.language as tl

from .. import fusion as kernels
from .entry import BYTES, Budget, Entry, Pointer, name_of, traded, unit_of


def _fusion(dtype: str, batch: int, side: int, channels: int, factors: tuple[int, ...]) -> Entry:
    """Of square maps, and terms that many times smaller."""
    terms = tuple(f"{name}_ptr" for name in ("first", "second", "third"))
    used = terms[: len(factors)]
    tiles, warps = _tiles(side * side, channels)
    share = 2 + sum(1 / factor**2 for factor in factors)
    return Entry(
        op="fusion",
        name=name_of("fusion", dtype, f"{side * side}x{channels}", "+".join(map(str, factors))),
        kernel=kernels.fusion_kernel,
        shape=(batch, side * side * channels),
        arguments={
            **dict.fromkeys(("base_ptr", *terms, "out_ptr"), Pointer(dtype)),
            "base_stride": side * side * channels,
            "H": side,
            "W": side,
            "C": channels,
            **{f"K{place + 1}": (*factors, 0, 0, 0)[place] for place in range(3)},
            "RELU": True,
            **tiles,
        },
        contiguous=("base_ptr", *used, "out_ptr"),
        traffic=lambda entry, batch, entries: int(share * batch * entries * BYTES[entry.dtype]),
        work=lambda entry, batch, entries: {unit_of(entry): (1 + len(factors)) * batch * entries},
        budget=_budget(dtype, channels),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )


def _fusion_vjp(dtype: str, batch: int, side: int, channels: int, factor: int) -> Entry:
    tiles, warps = _tiles((side // factor) ** 2, channels)
    return Entry(
        op="fusion",
        name=name_of("fusion_vjp", dtype, f"{side * side}x{channels}", f"by {factor}"),
        kernel=kernels.fusion_vjp_kernel,
        shape=(batch, side * side * channels),
        arguments={
            **dict.fromkeys(("vector_ptr", "value_ptr", "v_ptr", "pooled_ptr"), Pointer(dtype)),
            "vector_stride": side * side * channels,
            "H": side,
            "W": side,
            "C": channels,
            "K": factor,
            "RELU": True,
            "WRITE": True,
            **tiles,
        },
        contiguous=("vector_ptr", "value_ptr", "v_ptr", "pooled_ptr"),
        traffic=lambda entry, batch, entries: int((3 + 1 / factor**2) * batch * entries * BYTES[entry.dtype]),
        work=lambda entry, batch, entries: {unit_of(entry): 2 * batch * entries},
        budget=_budget(dtype, channels),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )


def _tiles(pixels: int, channels: int) -> tuple[dict[str, Any], int]:
    """As the ops cut maps into programs."""
    block = min(1 << (channels - 1).bit_length(), 128)
    rows = min(2048 // block, 1 << (pixels - 1).bit_length())
    return {"WIDE": tl.float32, "ROWS": rows, "BLOCK": block}, min(max(rows * block // 512, 1), 4)


def _budget(dtype: str, channels: int) -> Budget:
    access = min(16, BYTES[dtype] * (channels & -channels))
    return Budget(load=access, store=access)


ENTRIES = (
    _fusion("bf16", 32, 56, 32, (2, 4, 8)),
    traded(_fusion("fp32", 32, 14, 128, (1, 1, 2))),
    _fusion_vjp("bf16", 32, 56, 32, 2),
    _fusion_vjp("fp32", 32, 28, 64, 2),
)
