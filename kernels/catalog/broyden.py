"""The Broyden step's kernels in the catalog."""

from dataclasses import replace

import triton.language as tl

from .. import broyden as kernels
from .entry import (
    BYTES,
    MANY,
    ODD,
    ONE_LARGE,
    PLACES,
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


def _in_blocks_of(block: int, parts: int, rows: Rows) -> Rows:
    """These rows cut as the Broyden ops do it: 4096 bytes of a state at a time, at least 4 of each entry."""
    return replace(rows, parts=parts, chunk=rows.entries // parts, block=block)


def _broyden(part: str, dtype: str, memory: int, rows: Rows = MANY, note: str = "") -> Entry:
    """part: "residual" or "advance". The step is the first with a full memory."""
    slots = memory + 1
    constants = {
        "SLOTS": slots,
        "LANES": lanes_of(slots),
        "BLOCK": rows.block,
        "WIDE": tl.float64 if dtype == "fp64" else tl.float32,
    }
    fp64, warps = Pointer("fp64"), 4
    if part == "residual":
        states = ("fx_ptr", "x_ptr", "moves_ptr", "changes_ptr")
        small = {"dots_ptr": fp64, "record_ptr": fp64, "before_ptr": fp64}
        sizes = {**sizes_of(rows), "slot": 0, "newest": memory, "filled": slots, "LANDED": False}
    else:
        states = (*PLACES, "changes_ptr")
        small = dict.fromkeys(("dots_ptr", "matrix_ptr", "squares_ptr", "record_ptr", "before_ptr"), fp64)
        small["active_ptr"] = Pointer("i32")
        sizes = {**sizes_of(in_few_waves(rows, resident=2)), **ticks_of(slots, slots)}
        sizes |= {"slot": 0, "newest": memory, "stay": 0, "last": 0}
        warps = 8 if slots > 31 else 4
        constants |= {"PARTS": 1 << (rows.parts - 1).bit_length(), "RELATIVE": True, "OVER_BATCH": False}
    return Entry(
        op="broyden",
        name=name_of(f"broyden_{part}", dtype, memory, note),
        kernel=getattr(kernels, f"broyden_{part}_kernel"),
        shape=(rows.batch, rows.entries),
        arguments={**dict.fromkeys(states, Pointer(dtype)), **small, **sizes, **constants},
        contiguous=states,
        traffic=_broyden_residual_traffic if part == "residual" else _broyden_advance_traffic,
        work=_broyden_residual_work if part == "residual" else _broyden_advance_work,
        options={"enable_fp_fusion": True, "num_warps": warps}
        | ({"maxnreg": 255} if part == "advance" else {}),
        budget=budget_of(dtype, rows),
    )


def _broyden_residual_traffic(entry: Entry, batch: int, entries: int) -> int:
    """Read f(x), x, the open slot's two and m − 1 older pairs; write the newest pair and the open slot."""
    slots, lanes = entry.arguments["SLOTS"], entry.arguments["LANES"]
    states = (4 + 2 * (slots - 2) + 4) * batch * entries * BYTES[entry.dtype]
    return states + batch * (3 * lanes * 8 + 8 * 8)


def _broyden_residual_work(entry: Entry, batch: int, entries: int) -> dict[str, int]:
    """Each entry: four differences, three squares, and three products with each pair, in float64."""
    return {"fp64": (4 + 6 + 6 * (entry.arguments["SLOTS"] - 1)) * batch * entries}


def _broyden_advance_traffic(entry: Entry, batch: int, entries: int) -> int:
    """Read m changes and f(x) and write x, as a step that improves does, whose best stays where it is.

    M is read once and one row and column of it are written; so is the record.
    """
    slots, lanes = entry.arguments["SLOTS"], entry.arguments["LANES"]
    states = (slots + 1) * batch * entries * BYTES[entry.dtype]
    return states + batch * (3 * lanes * 8 + (slots * slots + 3 * slots + 1) * 8 + 13 * 8)


def _broyden_advance_work(entry: Entry, batch: int, entries: int) -> dict[str, int]:
    """Each entry: m products; each sample: one elimination in float64, about 2 m³."""
    slots = entry.arguments["SLOTS"]
    work = {"fp64": 2 * slots**3 * batch}
    work[unit_of(entry)] = work.get(unit_of(entry), 0) + 2 * slots * batch * entries
    return work


_IN_BLOCKS = _in_blocks_of(1024, 16, MANY)

ENTRIES = (
    _broyden("residual", "fp32", 10, _IN_BLOCKS),
    of_few(_broyden("residual", "bf16", 10, _IN_BLOCKS)),
    traded(_broyden("residual", "fp64", 5, _in_blocks_of(512, 32, MANY)), 24),
    _broyden("residual", "bf16", 10, ODD, "odd N"),
    traded(_broyden("advance", "fp32", 10, _IN_BLOCKS), 24),
    of_few(_broyden("advance", "bf16", 10, _IN_BLOCKS)),
    traded(_broyden("advance", "fp64", 5, _in_blocks_of(512, 32, MANY))),
    traded(_broyden("advance", "bf16", 10, ODD, "odd N"), 24),
    _broyden("advance", "fp32", 10, _in_blocks_of(1024, 256, ONE_LARGE), "one sample"),
    of_few(_broyden("advance", "fp32", 50, _IN_BLOCKS, "every pair")),
)
