"""The multiscale sum's kernels in the catalog."""

from typing import Any

import triton.language as tl

from .. import fusion as kernels
from .entry import BYTES, Budget, Entry, Pointer, name_of, traded, unit_of

Sizes = tuple[int, int, tuple[int, ...]]
"""Height and width, channels, and how many times smaller each term is."""


def _fusion(dtype: str, batch: int, *sums: Sizes, note: str = "") -> Entry:
    """Of square maps."""
    side, channels, factors = sums[0]
    parts = [_sum(dtype, *each) for each in sums]
    entries = sum(side * side * channels for side, channels, _ in sums)
    moved = sum(
        (2 + sum(1 / factor**2 for factor in factors)) * side * side * channels
        for side, channels, factors in sums
    )
    used = ("first_ptr", "second_ptr", "third_ptr")[: len(factors)]
    return Entry(
        op="fusion",
        name=name_of("fusion", dtype, f"{side * side}x{channels}", "+".join(map(str, factors)), note),
        kernel=kernels.fusion_kernel,
        shape=(batch, entries),
        arguments={
            "sums": tuple(operands for operands, *_ in parts),
            "samples": batch,
            "PROGRAMS": tuple(programs for _, _, programs, _ in parts),
            "CONSTANTS": tuple(constants for _, constants, *_ in parts),
        },
        contiguous=("base_ptr", *used, "out_ptr"),
        traffic=lambda entry, batch, size: int(moved / entries * batch * size * BYTES[entry.dtype]),
        work=lambda entry, batch, size: {unit_of(entry): (1 + len(factors)) * batch * size},
        budget=_budget(dtype, channels),
        options={"num_warps": max(warps for *_, warps in parts), "enable_fp_fusion": True},
    )


def _sum(dtype: str, side: int, channels: int, factors: tuple[int, ...]) -> tuple[Any, ...]:
    """The operands, the constants, the programs and the warps of a sum."""
    tile, programs, warps = _tiles(side * side, channels)
    stride = side * side * channels
    operands = (*(Pointer(dtype),) * 5, stride, stride, side, side)
    return operands, (channels, *(*factors, 0, 0, 0)[:3], True, *tile), programs, warps


def _fusion_vjp(dtype: str, batch: int, *maps: tuple[int, int, int], note: str = "") -> Entry:
    """maps: height and width, channels, and the factor of each."""
    side, channels, factor = maps[0]
    parts = [_pool(dtype, *each) for each in maps]
    return Entry(
        op="fusion",
        name=name_of("fusion_vjp", dtype, f"{side * side}x{channels}", f"by {factor}", note),
        kernel=kernels.fusion_vjp_kernel,
        shape=(batch, sum(side * side * channels for side, channels, _ in maps)),
        arguments={
            "pools": tuple(operands for operands, *_ in parts),
            "samples": batch,
            "PROGRAMS": tuple(programs for _, _, programs, _ in parts),
            "CONSTANTS": tuple(constants for _, constants, *_ in parts),
        },
        contiguous=("vector_ptr", "value_ptr", "v_ptr", "pooled_ptr"),
        traffic=lambda entry, batch, size: int((3 + 1 / factor**2) * batch * size * BYTES[entry.dtype]),
        work=lambda entry, batch, size: {unit_of(entry): 2 * batch * size},
        budget=_budget(dtype, channels),
        options={"num_warps": max(warps for *_, warps in parts), "enable_fp_fusion": True},
    )


def _pool(dtype: str, side: int, channels: int, factor: int) -> tuple[Any, ...]:
    """The same of one level of a product."""
    tile, programs, warps = _tiles((side // factor) ** 2, channels)
    operands = (*(Pointer(dtype),) * 4, side * side * channels, side, side)
    return operands, (channels, factor, True, True, *tile), programs, warps


def _tiles(pixels: int, channels: int) -> tuple[tuple[Any, int, int], int, int]:
    """As the ops cut maps into programs: WIDE, ROWS and BLOCK, how many programs a sample, and the warps."""
    block = min(1 << (channels - 1).bit_length(), 128)
    rows = min(2048 // block, 1 << (pixels - 1).bit_length())
    programs = -(-pixels // rows) * -(-channels // block)
    return (tl.float32, rows, block), programs, min(max(rows * block // 512, 1), 4)


def _budget(dtype: str, channels: int) -> Budget:
    access = min(16, BYTES[dtype] * (channels & -channels))
    return Budget(load=access, store=access)


ENTRIES = (
    _fusion("bf16", 32, (56, 32, (2, 4, 8))),
    traded(_fusion("fp32", 32, (14, 128, (1, 1, 2)))),
    _fusion(
        "bf16",
        96,
        (32, 32, (2, 4, 8)),
        (16, 64, (1, 2, 4)),
        (8, 128, (1, 1, 2)),
        (4, 256, (1, 1, 1)),
        note="all",
    ),
    _fusion_vjp("bf16", 32, (56, 32, 2)),
    _fusion_vjp("fp32", 32, (28, 64, 2)),
    _fusion_vjp("bf16", 96, (32, 32, 2), (16, 64, 2), (8, 128, 2), note="all"),
)
