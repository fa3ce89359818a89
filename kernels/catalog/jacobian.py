"""The Jacobian-norm estimate's kernels in the catalog."""

import triton.language as tl

from .. import jacobian as kernels
from .entry import BYTES, MANY, ODD, Budget, Entry, Pointer, Rows, budget_of, name_of, sizes_of, unit_of


def _probe(
    dtype: str, distribution: str, shape: tuple[int, int], note: str = "", budget: Budget | None = None
) -> Entry:
    return Entry(
        op="jacobian",
        name=name_of("probe", dtype, distribution, note),
        kernel=kernels.probe_kernel,
        shape=shape,
        arguments={
            "out_ptr": Pointer(dtype),
            "seed_ptr": Pointer("i64"),
            "index": 0,
            "B": shape[0],
            "N": shape[1],
            "GAUSSIAN": distribution == "gaussian",
            "BLOCK": max(2, min(1 << (shape[1] - 1).bit_length(), 2048)),
        },
        contiguous=("out_ptr",),
        traffic=lambda entry, batch, entries: batch * entries * BYTES[entry.dtype] + 8,
        work=_probe_work,
        budget=budget or Budget(),
    )


def _probe_work(entry: Entry, batch: int, entries: int) -> dict[str, int]:
    """Four entries: ten Philox rounds of ten integer operations; Box-Muller takes about 20 an entry."""
    floating = 20 if entry.arguments["GAUSSIAN"] else 2
    return {"int32": 25 * batch * entries, "fp32": floating * batch * entries}


def _squared_norm(dtype: str, rows: Rows = MANY, note: str = "") -> Entry:
    wide = "fp64" if dtype == "fp64" else "fp32"
    sizes = sizes_of(rows)
    del sizes["B"]
    return Entry(
        op="jacobian",
        name=name_of("squared_norm", dtype, note),
        kernel=kernels.squared_norm_kernel,
        shape=(rows.batch, rows.entries),
        arguments={
            "rows_ptr": Pointer(dtype),
            "partial_ptr": Pointer(wide),
            **sizes,
            "BLOCK": rows.block,
            "WIDE": getattr(tl, wide.replace("fp", "float")),
        },
        contiguous=("rows_ptr",),
        traffic=lambda entry, batch, entries: batch * entries * BYTES[entry.dtype] + batch * BYTES[wide],
        work=lambda entry, batch, entries: {unit_of(entry): 2 * batch * entries},
        budget=budget_of(dtype, rows),
    )


ENTRIES = (
    _probe("fp32", "gaussian", (64, 16384)),
    # A wave of 64 threads leaves each of them 4 entries of a block of 1024: 8 bytes.
    _probe("bf16", "gaussian", (64, 16384), budget=Budget(store=8)),
    _probe("fp32", "rademacher", (64, 16384)),
    _probe("fp16", "rademacher", (33, 1001), "odd N", Budget(store=2)),
    _squared_norm("fp32"),
    _squared_norm("bf16"),
    _squared_norm("fp64"),
    _squared_norm("fp32", ODD, "odd N"),
)
