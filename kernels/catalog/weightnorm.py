"""Weight normalisation's kernels in the catalog."""

from typing import Any

import triton.language as tl

from .. import weightnorm as kernels
from .entry import BYTES, Budget, Entry, Pointer, name_of, unit_of

Sizes = tuple[int, int, int, int]
"""Rows and columns of a weight, and those that its value has."""


def _weightnorm(dtype: str, out: str, *weights: Sizes, note: str = "") -> Entry:
    """Of weights in one dtype, whose values have another."""
    parts = [_part(dtype, out, *each) for each in weights]
    rows, columns, *_ = weights[0]
    entries = sum(each[0] * each[1] for each in weights)
    moved = sum(m * n * BYTES[dtype] + m_out * n_out * BYTES[out] for m, n, m_out, n_out in weights)
    return Entry(
        op="weightnorm",
        name=name_of("weightnorm", dtype, f"{rows}x{columns}", out, note),
        kernel=kernels.weightnorm_kernel,
        shape=(1, entries),
        arguments=_arguments(parts),
        contiguous=("v_ptr", "out_ptr"),
        traffic=lambda entry, batch, size: int(moved / entries * batch * size),
        work=lambda entry, batch, size: {unit_of(entry): 3 * batch * size},
        budget=_budget(dtype, out, columns, parts),
        options=_options(parts),
    )


def _weightnorm_vjp(dtype: str, out: str, *weights: Sizes, note: str = "") -> Entry:
    parts = [_part_vjp(dtype, out, *each) for each in weights]
    rows, columns, *_ = weights[0]
    entries = sum(each[0] * each[1] for each in weights)
    return Entry(
        op="weightnorm",
        name=name_of("weightnorm_vjp", dtype, f"{rows}x{columns}", out, note),
        kernel=kernels.weightnorm_vjp_kernel,
        shape=(1, entries),
        arguments=_arguments(parts),
        contiguous=("v_ptr", "vector_ptr", "of_v_ptr"),
        traffic=lambda entry, batch, size: (2 * BYTES[dtype] + BYTES[out]) * batch * size,
        work=lambda entry, batch, size: {unit_of(entry): 7 * batch * size},
        budget=_budget(dtype, out, columns, parts),
        options=_options(parts),
    )


def _part(dtype: str, out: str, rows: int, columns: int, more_rows: int, more_columns: int) -> Any:
    """The operands, the constants, the programs and the warps of a weight."""
    tile, warps = _tile(dtype, more_columns)
    operands = (Pointer(dtype), Pointer(dtype), Pointer(out), rows, more_rows)
    return operands, (columns, more_columns, True, *tile), -(-more_rows // tile[1]), warps


def _part_vjp(dtype: str, out: str, rows: int, columns: int, more_rows: int, more_columns: int) -> Any:
    """The same of its gradient."""
    tile, warps = _tile(dtype, columns)
    operands = (Pointer(dtype), Pointer(dtype), Pointer(out), Pointer(dtype), Pointer(dtype), rows)
    return operands, (columns, more_columns, True, *tile), -(-rows // tile[1]), warps


def _tile(dtype: str, columns: int) -> tuple[tuple[Any, int, int], int]:
    """As the op cuts rows into programs: WIDE, ROWS and BLOCK, and the warps."""
    block = min(1 << (columns - 1).bit_length(), 4096)
    rows = max(1, 1024 // block)
    wide = tl.float64 if dtype == "fp64" else tl.float32
    return (wide, rows, block), min(max(rows * block // 512, 1), 8)


def _arguments(parts: list[Any]) -> dict[str, Any]:
    return {
        "weights": tuple(operands for operands, *_ in parts),
        "PROGRAMS": tuple(programs for _, _, programs, _ in parts),
        "CONSTANTS": tuple(constants for _, constants, *_ in parts),
    }


def _options(parts: list[Any]) -> dict[str, Any]:
    return {"num_warps": max(warps for *_, warps in parts), "enable_fp_fusion": True}


def _budget(dtype: str, out: str, columns: int, parts: list[Any]) -> Budget:
    """By how rows of that many columns are aligned, and by what a thread of 64 a warp holds of a tile."""
    held = min(rows * block for _, (*_, rows, block), *_ in parts) // (64 * max(warps for *_, warps in parts))
    access = min(16, min(BYTES[dtype], BYTES[out]) * min(columns & -columns, held))
    return Budget(load=access, store=access)


_MULTISCALE = (
    (1280, 2304, 1280, 2304),
    (256, 11520, 256, 11520),
    (640, 1152, 640, 1152),
    (128, 5760, 128, 5760),
)

ENTRIES = (
    _weightnorm("fp32", "bf16", *_MULTISCALE, note="all"),
    _weightnorm("fp32", "fp32", (160, 288, 160, 288)),
    _weightnorm("fp32", "bf16", (48000, 700, 48000, 704)),
    _weightnorm("fp32", "bf16", (700, 48000, 704, 48000)),
    _weightnorm_vjp("fp32", "bf16", *_MULTISCALE, note="all"),
    _weightnorm_vjp("fp32", "fp32", (160, 288, 160, 288)),
    _weightnorm_vjp("fp32", "bf16", (48000, 700, 48000, 704)),
    _weightnorm_vjp("fp32", "bf16", (700, 48000, 704, 48000)),
)
