"""The stochastic Jacobian-norm estimate: probes from Philox, and squared norms per sample.

The formulas stand in triton_deq/reference/jacobian.py, which gives the same probes for the same seed.
"""

import triton
import triton.language as tl

from .primitives import probe_quads


@triton.jit(do_not_specialize=["index", "B"])
def probe_kernel(out_ptr, seed_ptr, index, B, N, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr):
    """Fill out: [B, N] with N(0, 1) or ±1. seed: [1] int64; index: number of the probe in its stream.

    A program writes BLOCK columns of two rows, r and r + 8, whose entries come from the same counters.
    """
    blocks = tl.cdiv(N, BLOCK)
    pair, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    columns = first // 2 + tl.arange(0, BLOCK // 2)
    pairs = tl.full([1], 0, tl.int32) + pair
    e0, e1, e2, e3 = probe_quads(tl.load(seed_ptr), index, pairs, columns, GAUSSIAN)
    upper, lower = tl.reshape(tl.join(e0, e1), [BLOCK]), tl.reshape(tl.join(e2, e3), [BLOCK])
    row = pair // 8 * 16 + pair % 8
    entries = first + tl.arange(0, BLOCK)
    out_ptr += row.to(tl.int64) * N
    tl.store(out_ptr + entries, upper, mask=entries < N)
    present = tl.where(row + 8 < B, N, 0)
    tl.store(out_ptr + tl.full((), N, tl.int64) * 8 + entries, lower, mask=entries < present)


@triton.jit(do_not_specialize=["parts"])
def squared_norm_kernel(rows_ptr, partial_ptr, N, parts, chunk, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """`Σ v²` over one part of each row. rows: [B, N]; partial: [B, parts]; grid (B, parts)."""
    sample = tl.program_id(0)
    part = tl.program_id(1)
    row = sample.to(tl.int64) * N
    begin = part * chunk
    total = tl.zeros([BLOCK], dtype=WIDE)
    for start in range(begin, tl.minimum(begin + chunk, N), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(rows_ptr + row + columns, mask=columns < N, other=0).to(WIDE)
        total += value * value
    tl.store(partial_ptr + sample * parts + part, tl.sum(total, axis=0))
