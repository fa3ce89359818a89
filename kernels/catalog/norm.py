"""The residual LayerNorm's kernels in the catalog."""

from typing import Any

import triton.language as tl

from .. import norm as kernels
from .entry import BYTES, Budget, Entry, Pointer, name_of, traded, unit_of


def _norm(
    dtype: str,
    rows: int,
    width: int,
    per: int,
    note: str = "",
    *,
    recorded: bool = False,
    branch: str | None = None,
    also: tuple[str, int] | None = None,
) -> Entry:
    """Of x, a branch and its mask, one row for per rows; recorded: n and 1/σ are written too.

    branch: its dtype if not x's, as under autocast. also: of which dtype, and how far apart, the rows are in
    which the value is left for a product as well.
    """
    pointers = ("x_ptr", "branch_ptr", "value_ptr", *(("normal_ptr",) if recorded or also else ()))
    others = ("mask_ptr", "gain_ptr", "offset_ptr", "normal_ptr")
    wide = Pointer("fp64" if dtype == "fp64" else "fp32")
    branch = branch or dtype
    size = (3 if recorded else 2) * BYTES[dtype] + BYTES[branch] + (BYTES[also[0]] if also else 0)
    return Entry(
        op="norm",
        name=name_of("norm", dtype, width, note),
        kernel=kernels.norm_kernel,
        shape=(rows, width),
        arguments={
            **dict.fromkeys((*pointers, *others), Pointer(dtype)),
            "branch_ptr": Pointer(branch),
            **({"normal_ptr": Pointer(also[0])} if also else {}),
            "inverse_ptr": wide if recorded else Pointer(dtype),
            "B": rows,
            "per": per,
            "D": width,
            "X_STRIDE": width,
            "BRANCH_STRIDE": width,
            "VALUE_STRIDE": width,
            "NORMAL_STRIDE": also[1] if also else width,
            "BRANCH": True,
            "MASK": True,
            "GAIN": not also,
            "NORMAL": recorded or also is not None,
            "INVERSE": recorded,
            "EPSILON": 1e-5,
            **_tiles(dtype, width),
        },
        contiguous=pointers,
        traffic=lambda entry, rows, width: (size * rows + (rows // per + 2) * BYTES[dtype]) * width,
        work=lambda entry, rows, width: {unit_of(entry): 11 * rows * width},
        budget=Budget(
            load=_budget(branch, width).load, store=_budget(also[0] if also else dtype, width).store
        ),
        options=_options(width),
    )


def _norm_vjp(
    dtype: str,
    rows: int,
    width: int,
    per: int,
    note: str = "",
    *,
    general: bool = False,
    narrow: str | None = None,
    plus: str | None = None,
) -> Entry:
    """A product; general: as the backward pass of all three results, with the gradient of a masked branch.

    narrow: as a step of the backward solve under autocast, with a summand and the branch's gradient of this
    dtype, and an addend. plus: as the last launch of such a step, with a vector of this dtype and an addend.
    """
    both = general or narrow is not None
    added = narrow is not None or plus is not None
    summed = ("addend_ptr",) if added else ()
    pointers = ("normal_ptr", "vector_ptr", "out_ptr", *summed)
    pointers = (*pointers, *(("shift_ptr", "branch_out_ptr") if both else ()))
    others = ("shift_ptr", "gain_ptr", "mask_ptr", "addend_ptr", "branch_out_ptr")
    wide = Pointer("fp64" if dtype == "fp64" else "fp32")
    narrow, vector = narrow or dtype, plus or dtype
    size = BYTES[vector] + (3 if added else 2) * BYTES[dtype] + (2 * BYTES[narrow] if both else 0)
    return Entry(
        op="norm",
        name=name_of("norm_vjp", dtype, width, note),
        kernel=kernels.norm_vjp_kernel,
        shape=(rows, width),
        arguments={
            **dict.fromkeys((*pointers, *others), Pointer(dtype)),
            **(dict.fromkeys(("shift_ptr", "branch_out_ptr"), Pointer(narrow)) if both else {}),
            **(
                dict.fromkeys(("vector_ptr", "shift_ptr", "gain_ptr", "mask_ptr"), Pointer(vector))
                if plus
                else {}
            ),
            **dict.fromkeys(("bend_ptr", "inverse_ptr"), wide),
            "R": rows,
            "B": rows,
            "per": per if both else 1,
            "D": width,
            "VECTOR_STRIDE": width,
            "BRANCH_OUT_STRIDE": width,
            "GAIN": general or not (both or added),
            "SHIFT": both,
            "BEND": general,
            "MASK": both,
            "ADDEND": added,
            "BRANCH": both,
            **_tiles(dtype, width),
        },
        contiguous=pointers,
        traffic=lambda entry, rows, width: (size * rows + BYTES[dtype]) * width,
        work=lambda entry, rows, width: {unit_of(entry): 9 * rows * width},
        budget=Budget(load=_budget(plus or narrow, width).load, store=_budget(narrow, width).store),
        options=_options(width),
    )


def _tiles(dtype: str, width: int) -> dict[str, Any]:
    """As the ops cut rows into programs."""
    block = max(16, 1 << (width - 1).bit_length())
    block = block if block <= 8192 else 4096
    return {
        "WIDE": tl.float64 if dtype == "fp64" else tl.float32,
        "ROWS": max(1, 1024 // block),
        "BLOCK": block,
    }


def _options(width: int) -> dict[str, Any]:
    block = _tiles("fp32", width)["BLOCK"]
    return {"num_warps": min(max(2, block // 512), 16), "enable_fp_fusion": True}


def _budget(dtype: str, width: int) -> Budget:
    """As wide as a row's alignment lets it be: the width is a constant that the compiler knows."""
    access = min(16, BYTES[dtype] * (width & -width))
    return Budget(load=access, store=access)


ENTRIES = (
    _norm("fp32", 2100, 700, 150),
    _norm("fp32", 2100, 700, 150, "narrow branch", branch="bf16"),
    _norm("fp32", 2100, 700, 150, "two places", branch="bf16", also=("bf16", 704)),
    _norm("bf16", 2100, 700, 150),
    _norm("bf16", 4096, 1024, 512),
    _norm("fp32", 4096, 1024, 512, "recorded", recorded=True),
    traded(_norm("fp16", 33, 1001, 11, "odd D"), 136),
    _norm("fp64", 128, 256, 16),
    _norm("fp32", 64, 16384, 16, "loop", recorded=True),
    _norm_vjp("fp32", 2100, 700, 150),
    _norm_vjp("fp32", 2100, 700, 150, "narrow", narrow="bf16"),
    _norm_vjp("fp32", 2100, 700, 150, "plus", plus="bf16"),
    _norm_vjp("bf16", 2100, 700, 150),
    _norm_vjp("bf16", 4096, 1024, 512, "general", general=True),
    _norm_vjp("fp32", 4096, 1024, 512, "general", general=True),
    _norm_vjp("fp16", 33, 1001, 11, "odd D"),
    _norm_vjp("fp64", 128, 256, 16),
    _norm_vjp("fp32", 64, 16384, 16, "loop", general=True),
)
