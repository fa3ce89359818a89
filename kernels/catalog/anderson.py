"""The Anderson step's kernels in the catalog."""

from dataclasses import replace

import triton.language as tl

from .. import anderson as kernels
from .entry import (
    BYTES,
    MANY,
    ODD,
    ONE_LARGE,
    PLACES,
    SMALL,
    Entry,
    Pointer,
    Rows,
    budget_of,
    in_few_waves,
    lanes_of,
    name_of,
    of_few,
    sizes_of,
    ticks_of,
    traded,
    unit_of,
)


def _cut(rows: Rows, dtype: str, history: int) -> Rows:
    """In blocks that four warps hold, as the ops cut them."""
    block = min(rows.block, 4 * _held_by_a_warp(dtype, history))
    parts = min(rows.parts * rows.block // block, 256)
    return replace(rows, block=block, parts=parts, chunk=-(-rows.entries // (parts * block)) * block)


def _options(block: int, dtype: str, history: int) -> dict[str, int | bool]:
    warps = max(1, min(8, block // _held_by_a_warp(dtype, history)))
    return {"num_warps": warps, "enable_fp_fusion": True}


def _held_by_a_warp(dtype: str, history: int) -> int:
    """Entries of a sample with all slots of a ring: 8192 bytes, as the ops have it."""
    return min(256, 8192 // (lanes_of(history) * max(BYTES[dtype], 4)))


def _residual(dtype: str, history: int, rows: Rows = MANY, note: str = "", *, landed: bool = False) -> Entry:
    """landed: f has left its value in the ring."""
    rows = _cut(rows, dtype, history)
    wide = "fp64" if dtype == "fp64" else "fp32"
    return Entry(
        op="anderson",
        name=name_of("anderson_residual", dtype, history, note),
        kernel=kernels.anderson_residual_kernel,
        shape=(rows.batch, rows.entries),
        arguments={
            **{name: Pointer(dtype) for name in ("fx_ptr", "x_ptr", "residuals_ptr", "iterates_ptr")},
            "dots_ptr": Pointer("fp64"),
            **{name: Pointer("fp64") for name in ("record_ptr", "before_ptr")},
            **sizes_of(rows),
            "slot": 0,
            "filled": history,
            "HISTORY": history,
            "LANES": lanes_of(history),
            "BLOCK": rows.block,
            "MIXING": 1.0,
            "LANDED": landed,
            "WIDE": getattr(tl, wide.replace("fp", "float")),
        },
        contiguous=("fx_ptr", "x_ptr", "residuals_ptr", "iterates_ptr"),
        traffic=_residual_traffic,
        work=_residual_work,
        options=_options(rows.block, dtype, history)
        | ({"maxnreg": 128} if history == 6 and dtype == "fp32" else {}),
        budget=budget_of(dtype, rows),
    )


def _advance(
    dtype: str,
    history: int,
    rows: Rows = MANY,
    note: str = "",
    *,
    relative: bool = True,
    over_batch: bool = False,
    relative_ridge: bool = True,
) -> Entry:
    rows = _cut(rows, dtype, history)
    wide = "fp64" if dtype == "fp64" else "fp32"
    return Entry(
        op="anderson",
        name=name_of("anderson_advance", dtype, history, note),
        kernel=kernels.anderson_advance_kernel,
        shape=(rows.batch, rows.entries),
        arguments={
            **{name: Pointer(dtype) for name in (*PLACES, "iterates_ptr")},
            "dots_ptr": Pointer("fp64"),
            **{name: Pointer("fp64") for name in ("gram_ptr", "record_ptr", "before_ptr")},
            "active_ptr": Pointer("i32"),
            **sizes_of(in_few_waves(rows, resident=3)),
            **ticks_of(history, history),
            "slot": 0,
            "stay": 0,
            "last": 0,
            "HISTORY": history,
            "LANES": lanes_of(history),
            "PARTS": 1 << (rows.parts - 1).bit_length(),
            "BLOCK": rows.block,
            "RELATIVE": relative,
            "OVER_BATCH": over_batch,
            "RIDGE": 1e-6,
            "RELATIVE_RIDGE": relative_ridge,
            "WIDE": getattr(tl, wide.replace("fp", "float")),
        },
        contiguous=(*PLACES, "iterates_ptr"),
        traffic=_advance_traffic,
        work=_advance_work,
        options=_options(rows.block, dtype, history),
        budget=budget_of(dtype, rows),
    )


def _step(dtype: str, history: int, rows: Rows, note: str = "") -> Entry:
    """Both in one launch; rows that fit one block."""
    arguments = {**_advance(dtype, history, rows).arguments, **_residual(dtype, history, rows).arguments}
    arguments["BLOCK"] = rows.block
    of_two_launches = ("dots_ptr", "before_ptr", "parts", "chunk", "PARTS", "OVER_BATCH")
    return Entry(
        op="anderson",
        name=name_of("anderson_step", dtype, history, note),
        kernel=kernels.anderson_step_kernel,
        shape=(rows.batch, rows.entries),
        arguments={name: value for name, value in arguments.items() if name not in of_two_launches},
        contiguous=("fx_ptr", *PLACES, "residuals_ptr", "iterates_ptr"),
        traffic=_step_traffic,
        work=lambda *of: _residual_work(*of) | _advance_work(*of) | {unit_of(of[0]): _step_work(*of)},
        options=_options(rows.block, dtype, history),
        budget=budget_of(dtype, rows),
    )


def _step_traffic(entry: Entry, batch: int, entries: int) -> int:
    """Read f(x), x, m − 1 older residuals and iterates; write a residual, an iterate and x."""
    history = entry.arguments["HISTORY"]
    states = (2 * history + 3) * batch * entries * BYTES[entry.dtype]
    return states + batch * ((history * history + 2 * history) * 8 + 12 * 8)


def _step_work(entry: Entry, batch: int, entries: int) -> int:
    """Of the unit that does the sums: the two kernels' together."""
    unit = unit_of(entry)
    return _residual_work(entry, batch, entries)[unit] + _advance_work(entry, batch, entries)[unit]


def _residual_traffic(entry: Entry, batch: int, entries: int) -> int:
    """Read f(x), x and the m − 1 older residuals; write a residual and an iterate, if that is not there; then
    the sums."""
    history, lanes = entry.arguments["HISTORY"], entry.arguments["LANES"]
    states = (history + 3 - entry.arguments["LANDED"]) * batch * entries * BYTES[entry.dtype]
    return states + batch * (lanes * BYTES[entry.arguments["dots_ptr"].dtype] + 8 * 8)


def _residual_work(entry: Entry, batch: int, entries: int) -> dict[str, int]:
    """Each entry: f − x, x + β (f − x), f², and m products."""
    return {unit_of(entry): (5 + 2 * entry.arguments["HISTORY"]) * batch * entries}


def _advance_traffic(entry: Entry, batch: int, entries: int) -> int:
    """Read m iterates and write x, as a step that improves does, whose best stays where it is; then the sums.

    The Gram matrix is read once and one row and column of it are written; so is the record.
    """
    history, lanes = entry.arguments["HISTORY"], entry.arguments["LANES"]
    states = (history + 1) * batch * entries * BYTES[entry.dtype]
    sums = lanes * BYTES[entry.arguments["dots_ptr"].dtype]
    return states + batch * (sums + (history * history + 2 * history) * 8 + 13 * 8)


def _advance_work(entry: Entry, batch: int, entries: int) -> dict[str, int]:
    """Each entry: m products; each sample: one m×m elimination in float64, about 2 m³."""
    history = entry.arguments["HISTORY"]
    work = {"fp64": 2 * history**3 * batch}
    work[unit_of(entry)] = work.get(unit_of(entry), 0) + 2 * history * batch * entries
    return work


ENTRIES = (
    _residual("fp32", 6),
    of_few(_residual("bf16", 6)),
    of_few(_residual("fp16", 5)),
    _residual("fp64", 6),
    traded(_residual("fp32", 6, note="landed", landed=True), 12),
    _residual("fp32", 1),
    of_few(_residual("fp32", 10, ONE_LARGE, "one sample")),
    _residual("bf16", 6, ODD, "odd N"),
    _advance("fp32", 6),
    of_few(_advance("bf16", 6)),
    of_few(_advance("fp16", 5, relative=False, note="absolute")),
    _advance("fp64", 6),
    _advance("fp32", 1),
    _advance("fp32", 6, over_batch=True, note="over batch"),
    traded(of_few(_advance("fp32", 10, ONE_LARGE, "one sample")), 12),
    _advance("bf16", 6, ODD, "odd N,absolute ridge", relative_ridge=False),
    _step("fp32", 6, SMALL),
    of_few(_step("bf16", 6, replace(SMALL, entries=2048, chunk=2048, block=2048))),
    _step("fp64", 5, SMALL),
    _step("bf16", 6, ODD, "odd N"),
)
